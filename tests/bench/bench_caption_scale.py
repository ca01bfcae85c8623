"""Captioning at scale on two cores: memory of driver and object store in the run's two halves, time against rows, cost
of a resume.

    python tests/bench/bench_caption_scale.py [--rows 1000000] [--small 10000] [--cpus 2]

Rows are small real JPEGs with distinct bytes in Parquet shards; the model is the tests' tiny BLIP-2, a real one. What
is looked at is therefore the stage: reading, decoding, Ray, checkpoints and writing. Three runs: `--small` rows,
`--rows` rows, and the second one again from a snapshot of its work directory at half way, which is what `kill -9`
leaves behind.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
SAMPLE_SECONDS = 0.5


def write_rows(folder: Path, rows: int, shard: int = 10_000) -> None:
    """Parquet shards of JPEGs of 256 scenes; a comment segment makes each row's bytes its own."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tests.pipelines.tiny_blip2 import picture

    scenes = [picture(seed, (48, 40)) for seed in range(256)]
    folder.mkdir(parents=True)
    for start in range(0, rows, shard):
        numbers = range(start, min(start + shard, rows))
        images = [numbered(scenes[number % 256], number) for number in numbers]
        table = pa.table({"image": images, "text": [f"picture {number}" for number in numbers]})
        pq.write_table(table, folder / f"{start:08d}.parquet")


def numbered(jpeg: bytes, number: int) -> bytes:
    comment = f"row {number}".encode()
    return jpeg[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + jpeg[2:]


def drive(data: str, output: str, model: str, cpus: int, log: str) -> None:
    """The run itself, in a process of its own that writes down its memory."""
    import psutil
    import ray

    from pipelines.caption.config import CaptionConfig
    from pipelines.caption.stage import run

    ray.init(num_cpus=cpus, include_dashboard=False, object_store_memory=500 << 20, logging_level="WARNING")
    over = threading.Event()

    def sample() -> None:
        me, committed = psutil.Process(), Committed(Path(output))
        with open(log, "w") as stream:
            while not over.wait(SAMPLE_SECONDS):
                row = {
                    "time": time.time(),
                    "driver": me.memory_info().rss,
                    "store": object_store_bytes(),
                    "rows": committed.rows(),
                }
                print(json.dumps(row), file=stream, flush=True)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    config = CaptionConfig(model=model, batch_size=64, max_new_tokens=8)
    config.guards.max_repetition = 1.0  # random weights do repeat themselves
    run(data, Path(output), config)
    over.set()
    thread.join()


class Committed:
    """Rows that a run has committed; each of its checkpoint files is looked into once."""

    def __init__(self, output: Path) -> None:
        self._output, self._rows = output, dict[str, int]()

    def rows(self) -> int:
        import pyarrow.parquet as pq

        for file in self._output.glob("_work/checkpoint-*/*.parquet"):
            if file.name not in self._rows and not file.name.endswith(".pending.parquet"):
                self._rows[file.name] = pq.read_metadata(file).num_rows
        return sum(self._rows.values())


def object_store_bytes() -> int:
    """Bytes in use in the local object store."""
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return int(get_memory_info_reply(state).store_stats.object_store_bytes_used)


def start(data: Path, output: Path, model: Path, cpus: int, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "--drive", str(data), str(output), str(model), str(cpus), str(log)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})


def samples(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def halves(log: Path, key: str) -> tuple[float, float]:
    """Peak of the first and of the second half of the captioning pass, in MB."""
    rows = pass_of(samples(log))
    middle = len(rows) // 2
    first, second = (max(row[key] for row in part) / 1e6 for part in (rows[:middle], rows[middle:]))
    return first, second


def pass_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """From the first block on disk to the last: not the start of Ray and the model, and not the writing of records at
    the end.
    """
    last = next(n for n, row in enumerate(rows) if row["rows"] == max(row["rows"] for row in rows))
    return [row for row in rows[: last + 1] if row["rows"]]


def snapshot(output: Path, copy: Path) -> None:
    """What a kill would leave behind now: checkpoints are copied before the data that they vouch for."""
    copy.mkdir()
    shutil.copy(output / ".stage.json", copy)
    for part in ("checkpoint-*", "shards", "index-*"):
        for folder in (output / "_work").glob(part):
            shutil.copytree(folder, copy / "_work" / folder.name, copy_function=os.link)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--small", type=int, default=10_000)
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--drive", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive:
        data, output, model, cpus, log = options.drive
        return drive(data, output, model, int(cpus), log)
    with tempfile.TemporaryDirectory(prefix="captune-scale-") as name:
        measure(Path(name), options)
    return None


def measure(root: Path, options: argparse.Namespace) -> None:
    from tests.pipelines.tiny_blip2 import make_blip2

    model = make_blip2(root / "blip2")
    per_row = {}
    for label, rows in (("small", options.small), ("large", options.rows)):
        write_rows(root / label, rows)
        output, began = root / f"out-{label}", time.time()
        driver = start(root / label, output, model, options.cpus, root / f"{label}.jsonl")
        if label == "large":
            snapshot_at_half(output, root / "half", rows, driver)
        assert driver.wait() == 0
        manifest = json.loads((output / "MANIFEST.json").read_text())
        assert manifest["captioned"] == manifest["rows_out"] == rows
        log = samples(root / f"{label}.jsonl")
        first, *_, last = pass_of(log)
        per_row[label] = {
            "all": (time.time() - began) / rows,
            # from the first committed block on: without the start of Ray and the model, which no row pays for
            "steady": (last["time"] - first["time"]) / (last["rows"] - first["rows"]),
            "pass": manifest["caption_seconds"] / rows,
        }
        seconds = manifest["caption_seconds"]
        print(
            f"{label}: {rows:,} rows, {seconds:.0f} s captioning ({rows / seconds:.0f} rows/s), "
            f"{time.time() - began:.0f} s in all"
        )
    for key, values in {key: [per_row[label][key] for label in per_row] for key in per_row["small"]}.items():
        print(
            f"time per row ({key}), large / small: {values[1] / values[0]:.2f}  ({values[0] * 1e3:.3f} -> "
            f"{values[1] * 1e3:.3f} ms)"
        )
    for key in ("driver", "store"):
        first, second = halves(root / "large.jsonl", key)
        print(f"{key} memory, peak of the halves: {first:.0f} MB, {second:.0f} MB, second / first {second / first:.2f}")
    print(
        f"driver memory over the whole run, index and records too: "
        f"{max(row['driver'] for row in samples(root / 'large.jsonl')) / 1e6:.0f} MB"
    )
    resume(root, model, options)


def snapshot_at_half(output: Path, copy: Path, rows: int, driver: subprocess.Popen[bytes]) -> None:
    committed = Committed(output)
    while driver.poll() is None:
        if 2 * committed.rows() >= rows:
            return snapshot(output, copy)
        time.sleep(SAMPLE_SECONDS)
    return None


def resume(root: Path, model: Path, options: argparse.Namespace) -> None:
    """Seconds from the same command to the first new captions on disk."""
    half = root / "half"
    if not half.exists():
        print("resume: the run was over before half of it could be seen")
        return
    committed = Committed(half)
    before, began = committed.rows(), time.time()
    driver = start(root / "large", half, model, options.cpus, root / "half.jsonl")
    while driver.poll() is None and committed.rows() <= before:
        time.sleep(0.05)
    print(f"resume with {before:,} rows done: {time.time() - began:.1f} s until new captions are on disk")
    assert driver.wait() == 0
    manifest = json.loads((half / "MANIFEST.json").read_text())
    assert manifest["captioned"] == options.rows, "the resumed run lost or doubled rows"
    print(f"resumed rows {manifest['resumed_rows']:,}, new rows {manifest['new_rows']:,}")


if __name__ == "__main__":
    main()
