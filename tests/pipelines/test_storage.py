"""Datasets at an address read as they do from a disk: the same rows, the same ids; patterns name several files; errors
name the path.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.errors import UserError
from pipelines.formats import open_dataset, to_record, webdataset
from pipelines.images import BadImage, read_bytes
from pipelines.storage import expand

from .tiny_blip2 import make_blip2


def jpeg(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (24 + seed, 20), (seed * 40 % 256, 90, 200)).save(stream, "JPEG")
    return stream.getvalue()


@pytest.fixture
def datasets(tmp_path: Path) -> Path:
    """One small dataset per format, below one folder."""
    root = tmp_path / "root"
    (root / "photos" / "deep").mkdir(parents=True)
    for name, seed in (("photos/a.jpg", 1), ("photos/deep/b.PNG", 2), ("photos/.hidden.jpg", 3)):
        (root / name).write_bytes(jpeg(seed))
    (root / "photos" / "a.txt").write_text("from txt\n")
    (root / "photos" / "metadata.jsonl").write_text('{"file_name": "deep/b.PNG", "text": "described", "k": 1}\n')
    (root / "lines").mkdir()
    for part in (1, 2):
        lines = [{"text": f"c{part}", "images": ["../photos/a.jpg"]}, {"text": "gone", "images": ["no.jpg"]}]
        (root / "lines" / f"{part}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (root / "tars").mkdir()
    sample = {"sample_id": "1", "suffix": ".jpg", "image": jpeg(4), "caption": "t", "meta": {"k": 1}}
    webdataset.write([sample], root / "tars" / "0.tar")
    (root / "tables").mkdir()
    pq.write_table(pa.table({"image": [jpeg(5)], "text": ["p"]}), root / "tables" / "0.parquet")
    pq.write_table(pa.table({"image": ["../photos/a.jpg"], "text": ["q"]}), root / "tables" / "1.parquet")
    return root


INPUTS = ("photos", "lines/*.jsonl", "tars", "tables", "tables/0.parquet", "**/*.tar")


def upload(root: Path, filesystem: object, bucket: str) -> None:
    for file in root.rglob("*"):
        if file.is_file():
            with filesystem.open_output_stream(f"{bucket}/{file.relative_to(root)}") as stream:  # type: ignore[attr-defined]
                stream.write(file.read_bytes())


def ids_and_errors(path: str) -> list[tuple[str, str, str, str]]:
    records = [to_record(row) for row in open_dataset(path).rows()]
    return [(r["sample_id"], r["caption"], (r["error"] or "")[:12], r["meta"]) for r in records]


def test_far_is_as_near(datasets: Path) -> None:
    """Every format through a filesystem that is not the disk gives what the disk gives; an address among local rows is
    read too.
    """
    import fsspec
    import pyarrow.fs as fs

    upload(datasets, fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem("memory"))), "/bucket/x")
    for name in INPUTS:
        near, far = f"{datasets}/{name}", f"memory://bucket/x/{name}"
        assert ids_and_errors(near) == ids_and_errors(far), name
        if "." not in name:  # of a folder; a single shard far away counts by the time of its upload, too
            assert open_dataset(near).identity() == open_dataset(far).identity(), name
    assert [row[1] for row in ids_and_errors("memory://bucket/x/photos")] == ["from txt", "described"]
    (datasets / "mixed.jsonl").write_text('{"text": "far", "images": ["memory://bucket/x/photos/a.jpg"]}\n')
    (record,) = (to_record(row) for row in open_dataset(datasets / "mixed.jsonl").rows())
    assert record["error"] is None and record["image_uri"] == "memory://bucket/x/photos/a.jpg"
    with pytest.raises(BadImage, match="missing file: memory://bucket/none.jpg"):
        read_bytes("memory://bucket/none.jpg")
    with pytest.raises(UserError, match="memory://bucket/none: no such file"):
        open_dataset("memory://bucket/none")


def test_patterns(datasets: Path) -> None:
    """A pattern is its files in order; growing it changes the identity; none, or several formats, is an error with the
    pattern in it.
    """
    assert [path.name for path in expand(f"{datasets}/lines/*.jsonl")] == ["1.jsonl", "2.jsonl"]
    dataset = open_dataset(f"{datasets}/lines/*.jsonl")
    before = dataset.identity()
    assert [row.where for row in dataset.rows()] == ["1.jsonl:1", "1.jsonl:2", "2.jsonl:1", "2.jsonl:2"]
    shutil.copy(datasets / "lines" / "1.jsonl", datasets / "lines" / "3.jsonl")
    assert open_dataset(f"{datasets}/lines/*.jsonl").identity() != before
    with pytest.raises(UserError, match=r"x\*.tar: no file fits"):
        open_dataset(f"{datasets}/x*.tar")
    with pytest.raises(UserError, match="several formats"):
        open_dataset(f"{datasets}/t*/0.*")


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A server that speaks S3 (`pip install 'moto[server]'`, in an environment of its own: its dependencies are older
    than ours).
    """
    import pyarrow.fs as fs

    if not (server := os.environ.get("CAPTUNE_MOTO_SERVER") or shutil.which("moto_server")):
        pytest.skip("no moto_server; CAPTUNE_MOTO_SERVER names one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [server, "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for key, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    while socket.socket().connect_ex(("127.0.0.1", port)) and process.poll() is None:
        time.sleep(0.1)
    yield fs.S3FileSystem(
        endpoint_override=os.environ["AWS_ENDPOINT_URL"],
        allow_bucket_creation=True,
        allow_delayed_open=True,  # small files in one request: not every moto can put parts together
    )
    process.kill()


@pytest.mark.heavy
def test_s3(s3: object, datasets: Path, tmp_path: Path) -> None:
    """The same through pyarrow's own S3, and a whole captioning run with a dataset and pictures in a bucket."""
    from pipelines.records import iter_records

    s3.create_dir("captune-test")  # type: ignore[attr-defined]
    upload(datasets, s3, "captune-test/x")
    for name in INPUTS:
        assert ids_and_errors(f"{datasets}/{name}") == ids_and_errors(f"s3://captune-test/x/{name}"), name
    command = [sys.executable, "-m", "ray_jobs.cli", "caption", "--input", "s3://captune-test/x/photos"]
    command += ["--output", str(tmp_path / "out"), "--caption.model", str(make_blip2(tmp_path / "blip2")), "--json"]
    done = subprocess.run([*command, "--caption.max_new_tokens", "4"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    manifest = json.loads(done.stdout.splitlines()[-1])
    assert manifest["captioned"] == 2 == manifest["rows_out"]
    assert {r["image_uri"] for r in iter_records(tmp_path / "out")} == {
        "s3://captune-test/x/photos/a.jpg", "s3://captune-test/x/photos/deep/b.PNG"
    }  # fmt: skip


def test_s3_without_credentials_names_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody there, or nobody let in: one line with the address and where credentials come from, not a traceback."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(UserError, match="s3://nobody-there/set.tar: cannot be read; credentials.*AWS_ACCESS_KEY_ID"):
        open_dataset("s3://nobody-there/set.tar")
