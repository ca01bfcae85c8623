"""The captioning stage: every row accounted for, whatever its file is like and whatever is killed meanwhile."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image, UnidentifiedImageError

from pipelines.caption import stage
from pipelines.caption.config import CaptionConfig
from pipelines.caption.sizing import rows_per_batch, size_pass
from pipelines.errors import UserError
from pipelines.records import Record, is_repeat, iter_records

from ..tiny_blip2 import picture

DRIVER = """
import sys, ray
from pathlib import Path
from pipelines.caption.config import CaptionConfig
from pipelines.caption.stage import run
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200 << 20)
run(sys.argv[1], Path(sys.argv[2]), CaptionConfig(model=sys.argv[3], batch_size=8, max_new_tokens=24))
"""


def config(model: Path, **changes: object) -> CaptionConfig:
    return CaptionConfig(**{"model": str(model), "batch_size": 8, "max_new_tokens": 8, **changes})  # type: ignore[arg-type]


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def mixed_bag(folder: Path) -> dict[str, str | None]:
    """One file per thing that can be wrong (or merely odd) with a picture; returns the error kind each must end
    with.
    """
    rgb = Image.open(io.BytesIO(picture(1)))
    frames = [Image.new("P", (40, 30), shade) for shade in range(3)]
    files: dict[str, tuple[bytes | None, str | None]] = {
        "good.jpg": (picture(2), None),
        "cmyk.jpg": (encode(rgb.convert("CMYK"), "JPEG"), None),
        "palette.png": (encode(rgb.convert("P"), "PNG"), None),
        "animated.gif": (encode(frames[0], "GIF", save_all=True, append_images=frames[1:]), None),
        "transparent.png": (encode(rgb.convert("RGBA"), "PNG"), None),
        "tiny.png": (encode(Image.new("L", (1, 1)), "PNG"), None),
        "broken.png": (encode(rgb, "PNG")[:60] + b"\0" * 40, "broken image"),
        "truncated.jpg": (picture(3)[:400], "broken image"),
        "empty.jpg": (b"", "empty file"),
        "text.jpg": (b"<html>404 not found</html>", "not an image"),
        "bomb.png": (encode(Image.new("1", (20_000, 20_000)), "PNG"), "too large"),
        "missing.jpg": (None, "missing file"),
        "turned.jpg": (
            encode(rgb, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"),
            None,
        ),
        "progressive.jpg": (encode(rgb, "JPEG", progressive=True), None),
        "trailing.jpg": (picture(4) + b"\0" * 999, None),
        "sixteen.png": (encode(rgb.convert("I;16"), "PNG"), None),
        "float.tiff": (encode(rgb.convert("F"), "TIFF"), None),
    }
    files |= every_format(rgb.resize((64, 64)))
    folder.mkdir()
    for name, (data, _) in files.items():
        if data is not None:
            (folder / name).write_bytes(data)
    return {name: kind for name, (_, kind) in files.items()}


def every_format(rgb: Image.Image) -> dict[str, tuple[bytes | None, str | None]]:
    """One file in each format that this Pillow writes; what it cannot read back (documents, video) is no usable
    picture.
    """
    Image.init()
    files: dict[str, tuple[bytes | None, str | None]] = {}
    for format in sorted(Image.SAVE):
        for mode in ("RGB", "P", "L", "1"):
            try:
                data = encode(rgb.convert(mode), format)
            except (OSError, ValueError, KeyError):
                continue
            try:
                if format == "EPS":
                    raise UnidentifiedImageError  # a program, and where Ghostscript is installed Pillow would run it
                with Image.open(io.BytesIO(data)) as again:
                    again.load()
                files[f"{format}.{mode}"] = (data, None)
            except UnidentifiedImageError:
                files[f"{format}.{mode}"] = (data, "not an image")
            except OSError:
                files[f"{format}.{mode}"] = (data, "broken image")
            break
    return files


def write_jsonl(path: Path, names: list[str]) -> Path:
    lines = [
        json.dumps({"text": f"<__dj__image> {name} <|__dj__eoc|>", "images": [name], "tag": name}) for name in names
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def by_caption(output: Path) -> dict[str, Record]:
    return {record["caption"]: record for record in iter_records(output)}


@pytest.mark.heavy
def test_mixed_bag_keeps_every_row_and_names_every_fault(ray_cluster: None, blip2: Path, tmp_path: Path) -> None:
    """Bad pictures become rows with a reason; odd but whole pictures are captioned; duplicates stay and are not
    captioned twice.
    """
    expected = mixed_bag(tmp_path / "data")
    dataset = write_jsonl(tmp_path / "data" / "set.jsonl", [*expected, "good.jpg", "good.jpg"])
    with dataset.open("a") as stream:
        stream.write('this is no JSON\n{"text": "two", "images": ["good.jpg", "cmyk.jpg"]}\n{"text": "none"}\n')
        stream.write('{"text": "far", "images": ["https://example.org/x.jpg"]}\n')
    manifest = stage.run(str(dataset), tmp_path / "out", config(blip2, rows_per_shard=20))

    assert manifest["rows_in"] == manifest["rows_out"] == len(expected) + 6
    kinds = Counter(expected.values())
    assert kinds[None] > 20, "Pillow reads more formats than that"
    assert manifest["captioned"] == kinds.pop(None) and manifest["duplicates"] == 2
    assert manifest["failed"] == kinds + Counter({"bad row": 3, "remote image": 1})
    assert manifest["captioned"] + manifest["duplicates"] + sum(manifest["failed"].values()) == manifest["rows_out"]
    records = list(iter_records(tmp_path / "out"))
    assert len({record["sample_id"] for record in records}) == len(records)
    for record in records:
        assert (record["recaption"] is None) == (record["error"] is not None)
        assert record["candidates"] == ([] if record["recaption"] is None else [record["recaption"]])
        kind = expected.get(record["caption"])
        assert kind is None or (record["error"] or "").startswith(kind), record["error"]
    broken = by_caption(tmp_path / "out")["truncated.jpg"]
    assert "set.jsonl:8" in (broken["error"] or "") and json.loads(broken["meta"]) == {"tag": "truncated.jpg"}
    doubles = [record for record in records if is_repeat(record["sample_id"])]
    assert {record["sample_id"][-2:] for record in doubles} == {"-2", "-3"}
    assert len({record["recaption"] for record in records if record["caption"] == "good.jpg"}) == 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if not p.name.startswith(".")) == [
        "MANIFEST.json", "contact_sheet.html", "part-00000.parquet", "part-00001.parquet", "part-00002.parquet"
    ]  # fmt: skip


@pytest.mark.heavy
def test_captions_are_the_engines_and_a_finished_run_returns_at_once(
    ray_cluster: None, blip2: Path, tmp_path: Path
) -> None:
    """A folder of ordinary photographs works; Ray, batching and order change no caption; the second call does
    nothing.
    """
    from pipelines.blip2.engine import BlipCaptioner
    from pipelines.images import decode

    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for seed in range(20):
        (tmp_path / "photos" / ("deep" if seed % 2 else ".") / f"{seed}.JPG").write_bytes(picture(seed))
    first = stage.run(str(tmp_path / "photos"), tmp_path / "out", config(blip2))
    engine = BlipCaptioner(blip2, config(blip2))
    for record in iter_records(tmp_path / "out"):
        uri = record["image_uri"]
        assert uri is not None and record["image"] is None
        alone = engine.caption(engine.preprocess([decode(Path(uri).read_bytes())]))
        assert record["recaption"] == alone[0].chosen
    started = time.monotonic()
    again = stage.run(str(tmp_path / "photos"), tmp_path / "out", config(blip2, batch_size=3, actors=2))
    assert again["finished"] == first["finished"] and time.monotonic() - started < 1
    with pytest.raises(UserError, match="max_new_tokens"):
        stage.run(str(tmp_path / "photos"), tmp_path / "out", config(blip2, max_new_tokens=9))


@pytest.mark.heavy
def test_embedded_bytes_stay_in_the_record(ray_cluster: None, blip2: Path, tmp_path: Path) -> None:
    """A tar's images are the records' own; there is no file to point to."""
    from pipelines.formats import webdataset

    samples = [
        {"sample_id": f"{i}", "suffix": ".jpg", "image": picture(i), "caption": f"c{i}", "meta": {}} for i in range(3)
    ]
    webdataset.write(samples, tmp_path / "a.tar")
    stage.run(str(tmp_path / "a.tar"), tmp_path / "out", config(blip2))
    assert {r["caption"]: r["image"] for r in iter_records(tmp_path / "out")} == {f"c{i}": picture(i) for i in range(3)}


def test_bad_requests_are_refused_before_any_work(blip2: Path, tmp_path: Path) -> None:
    """No dataset, no model, no weights, a foreign output directory: a message that names it, and nothing written."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(picture(0))
    bare = tmp_path / "bare"
    shutil.copytree(blip2, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(UserError, match="no such file"):
        stage.run(str(tmp_path / "nowhere"), tmp_path / "out", config(blip2))
    with pytest.raises(UserError, match="bare: no weights"):
        stage.run(str(tmp_path / "photos"), tmp_path / "out", config(bare))
    with pytest.raises(UserError, match=r"caption\.model is not set"):
        stage.run(str(tmp_path / "photos"), tmp_path / "out", CaptionConfig())
    with pytest.raises(UserError, match="already holds files"):
        stage.run(str(tmp_path / "photos"), bare, config(blip2))
    assert not (tmp_path / "out").exists()


def test_every_wish_is_fitted_into_two_cpus(blip2: Path) -> None:
    """Actors never take the CPUs that their feeders and the checkpoint filter need; what cannot be is an error with its
    key.
    """
    for wish in (
        CaptionConfig(),
        CaptionConfig(actors=4),
        CaptionConfig(cpus_per_actor=2),
        CaptionConfig(cpus_per_actor=0),
    ):
        sizing = size_pass(wish, 2, 0)
        # the checkpoint filter, a reader, a decoder and a writer have room beside the replicas
        assert sizing.actors >= 1 and sizing.actors * sizing.actor_cpus + 1 + 3 * sizing.task_cpus <= 2
        assert sizing.feeders == 1, "the reading tasks of a resumed run would leave the writers no core"
    two = size_pass(CaptionConfig(actors=2, cpus_per_actor=0.25), 2, 0)
    assert two.actors == 2 and two.decode_inside, "replicas that share cores decode for themselves"
    assert size_pass(CaptionConfig(actors=4), 16, 0).actors == 4
    assert not size_pass(CaptionConfig(actors=2, gpus_per_actor=0.5), 16, 1).decode_inside, (
        "a GPU must not wait for its own decoding"
    )
    assert size_pass(CaptionConfig(actors=4, gpus_per_actor=1), 16, 2).actors == 2
    with pytest.raises(UserError, match="gpus_per_actor"):
        size_pass(CaptionConfig(gpus_per_actor=1), 16, 0)
    with pytest.raises(UserError, match="at least 2 CPUs"):
        size_pass(CaptionConfig(), 1, 0)


def test_batches_are_whole_and_small_enough() -> None:
    """Two decode batches go to the engine together, unless the object store is small."""
    config = CaptionConfig(batch_size=32)
    assert rows_per_batch(config, 150_528, 8e9) == 64
    assert rows_per_batch(config, 150_528, 100e6) == 41
    assert rows_per_batch(config, 10**9, 200e6) == 1


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    for seed in range(640):
        (folder / f"{seed:03d}.jpg").write_bytes(picture(seed, (48, 40)))
    (folder / "600.jpg").write_bytes(b"nothing")
    return folder


def start_driver(data: Path, output: Path, model: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(data), str(output), str(model)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_killed_driver_continues_to_the_same_records(blip2: Path, many: Path, tmp_path: Path) -> None:
    """Kill -9 during the index, after some and after most captions: the reruns end in the very same files as one quiet
    run.
    """
    quiet = start_driver(many, tmp_path / "quiet", blip2)
    assert quiet.wait(900) == 0, quiet.stdout.read().decode()[-3000:]  # type: ignore[union-attr]
    killed = tmp_path / "killed"
    for pattern, count in (
        ("_work/index-*.part/*", 2),
        ("_work/checkpoint-*/*.parquet", 2),
        ("_work/checkpoint-*/*.parquet", 6),
    ):
        driver = start_driver(many, killed, blip2)
        while len(list(killed.glob(pattern))) < count and driver.poll() is None:
            time.sleep(0.003)
        assert driver.poll() is None, "finished before it could be killed"
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    last = start_driver(many, killed, blip2)
    assert last.wait(900) == 0, last.stdout.read().decode()[-3000:]  # type: ignore[union-attr]
    assert (killed / "part-00000.parquet").read_bytes() == (tmp_path / "quiet" / "part-00000.parquet").read_bytes()
    manifest, undisturbed = (json.loads((d / "MANIFEST.json").read_text()) for d in (killed, tmp_path / "quiet"))
    assert manifest["resumed_rows"] >= 64 and manifest["rows_out"] == 640 == undisturbed["rows_out"]
    assert not (killed / "_work").exists()


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_dead_captioning_actor_does_not_kill_the_job(
    ray_cluster: None, blip2: Path, many: Path, tmp_path: Path
) -> None:
    """A replica's process is killed in the middle: Ray starts it again, and no row is lost or doubled."""
    import psutil

    victims: list[int] = []

    def assassin() -> None:
        while not victims:
            if list((tmp_path / "out").glob("_work/checkpoint-*/*.parquet")):
                for process in psutil.process_iter(["name", "cmdline", "environ"]):
                    command = " ".join(process.info["cmdline"] or [])
                    if "Captioner" in command and _is_ours(process):
                        process.kill()
                        victims.append(process.pid)
            time.sleep(0.005)

    thread = threading.Thread(target=assassin, daemon=True)
    thread.start()
    manifest = stage.run(str(many), tmp_path / "out", config(blip2, max_new_tokens=24))
    assert victims, "no replica was found to kill"
    assert manifest["rows_out"] == 640 and manifest["captioned"] == 639
    assert len({r["sample_id"] for r in iter_records(tmp_path / "out")}) == 640


def _is_ours(process: object) -> bool:
    """Several clusters may share the machine; ours is the one whose raylet is this test's child."""
    return os.getpid() in [parent.pid for parent in process.parents()]  # type: ignore[attr-defined]
