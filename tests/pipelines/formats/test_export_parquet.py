"""`captune export --format parquet` is what Hugging Face's `datasets` reads: images as images, in shards."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.errors import UserError
from pipelines.formats import open_dataset, parquet
from pipelines.formats.export import export
from pipelines.manifest import open_stage
from pipelines.records import new_record, write_shard

Jpeg = Callable[[int], bytes]


@pytest.fixture
def captions(tmp_path: Path, jpeg: Jpeg) -> Path:
    """Ten pictures as bytes and one as a file, all captioned anew."""
    (tmp_path / "a.jpg").write_bytes(jpeg(99))
    rows = [new_record(f"old {n}", image=jpeg(n), meta={"n": n}) for n in range(10)]
    rows.append(new_record("old 10", image_uri=str(tmp_path / "a.jpg"), content=jpeg(99), meta={"n": 10}))
    for n, row in enumerate(rows):
        row["recaption"] = f"new {n}"
    stage = open_stage(tmp_path / "captions", "caption", {})
    write_shard(tmp_path / "captions" / "part-00000.parquet", rows[:6])
    write_shard(tmp_path / "captions" / "part-00001.parquet", rows[6:])
    stage.finish()
    return tmp_path / "captions"


@pytest.mark.parametrize("output", ["set.parquet", "shards"])
def test_datasets_reads_it(captions: Path, tmp_path: Path, jpeg: Jpeg, output: str) -> None:
    import datasets

    export(captions, tmp_path / output, "parquet")
    files = str(tmp_path / output if output.endswith(".parquet") else tmp_path / output / "*.parquet")
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(loaded.features["image"], datasets.Image)
    assert loaded["text"][:] == [f"new {n}" for n in range(11)]
    assert (loaded[0]["image"].size, loaded[10]["image"].size) == ((24, 20), (123, 20))
    raw = loaded.cast_column("image", datasets.Image(decode=False))[10]["image"]
    assert raw["bytes"] == jpeg(99) and raw["path"].endswith(".jpg") and "/" not in raw["path"]


def test_shards_and_row_groups_are_small(
    captions: Path, tmp_path: Path, jpeg: Jpeg, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "_GROUP_ROWS", 2)
    monkeypatch.setattr(parquet, "_SHARD_BYTES", 3 * len(jpeg(1)))
    facts = export(captions, tmp_path / "shards", "parquet")
    files = sorted((tmp_path / "shards").iterdir())
    assert [file.name for file in files] == [f"part-{n:05d}.parquet" for n in range(3)]
    assert [pq.read_metadata(file).num_rows for file in files] == [4, 4, 3] and facts["written"] == 11
    assert [row.meta["n"] for row in open_dataset(tmp_path / "shards").rows()] == list(range(11))


def test_shards_are_not_mixed_with_others(captions: Path, tmp_path: Path) -> None:
    """Among a stage's own they would be taken for more records; beside an older export's for more rows."""
    with pytest.raises(UserError, match="keeps its own shards"):
        export(captions, captions / "export.parquet", "parquet")
    export(captions, tmp_path / "shards", "parquet")
    for output in (captions, tmp_path / "shards"):
        with pytest.raises(UserError, match=r"empty folder, or to a file named \*\.parquet"):
            export(captions, output, "parquet")


@pytest.mark.heavy
def test_a_large_set_takes_little_memory(tmp_path: Path) -> None:
    """160 MB of images; the process that exports them grows by less than half of that."""
    stage = open_stage(tmp_path / "captions", "caption", {})
    rows = [new_record(f"{n}", image=b"\xff\xd8" + os.urandom(400_000)) | {"recaption": "x"} for n in range(400)]
    write_shard(tmp_path / "captions" / "part-00000.parquet", rows)  # type: ignore[arg-type]
    stage.finish()
    program = (
        "import resource, sys; from pipelines.formats.export import export; import pyarrow.parquet, numpy;"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = peak();"
        "export(sys.argv[1], sys.argv[2], 'parquet'); print(peak() - before)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "captions"), str(tmp_path / "shards")]
    grown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert int(grown) / 1024 < 80
