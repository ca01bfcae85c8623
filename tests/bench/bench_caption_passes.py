"""What the captioning stage does around its model, at any number of rows: the index before it, the count of what is
left, the join and the records after it.

    python tests/bench/bench_caption_passes.py [--rows 100000 1000000 10000000] [--cpus 2]

Rows are the smallest real pictures (GIFs of one pixel, each with bytes of its own) in Parquet shards, one in a hundred
of them a duplicate; the captions are recorded ones, written as the model's pass commits them. One line a pass and size:
seconds, microseconds a row, and the peak of the driver's memory. Each size has a process of its own.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
_SHARD, _REPEATED = 100_000, 100
_SAMPLE_SECONDS = 0.05


def write_rows(folder: Path, rows: int) -> None:
    """Parquet shards; every hundredth row is the one a hundred rows before it again."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (1, 1)).save(stream, "GIF")
    gif = stream.getvalue()
    folder.mkdir(parents=True)
    for start in range(0, rows, _SHARD):
        numbers = [n if n % _REPEATED or not n else n - _REPEATED + 1 for n in range(start, min(start + _SHARD, rows))]
        images = [gif + str(number).encode() for number in numbers]
        table = pa.table({"image": images, "text": [f"picture {number}" for number in numbers]})
        pq.write_table(table, folder / f"{start:09d}.parquet")


def record_captions(work: Path) -> None:
    """Results of every row that the model would see, in a file for each index file, as Ray Data leaves them."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from pipelines.caption.index import index_files
    from pipelines.caption.results import Results, result_schema

    results = Results(work, "recorded")
    results.make_directories()
    things = ["a red sign", "two dogs", "an old man", "a bowl of fruit", "a train", "three birds", "a girl", "the sea"]
    places = ["on a street", "in the grass", "at a table", "under a tree", "near the water", "in front of a house"]
    says = [f"{a} {b} with {c}" for a in things for b in places for c in things]
    for number, file in enumerate(index_files(work / "index")):
        table = pq.ParquetFile(file).read(columns=["sample_id", "skip"])
        ids = table.filter(pc.invert(table["skip"]))["sample_id"].to_pylist()
        rows = [
            {"sample_id": key, "candidates": [text], "recaption": text}
            for key in ids
            for text in [says[int(key[:8], 16) % len(says)]]
        ]
        said = pa.Table.from_pylist(rows, schema=result_schema())
        pq.write_table(said, results.shards / f"r_{number:06d}.parquet")
        pq.write_table(said.select(["sample_id"]), results.checkpoint / f"r_{number:06d}.parquet")


def measured(what: str, rows: int, work: Callable[[], Any]) -> Any:
    """Run, print one JSON line, and return what came of it."""
    import psutil

    over, peak = threading.Event(), 0

    def sample() -> None:
        nonlocal peak
        me = psutil.Process()
        while not over.wait(_SAMPLE_SECONDS):
            peak = max(peak, me.memory_info().rss)

    threading.Thread(target=sample, daemon=True).start()
    began = time.monotonic()
    found = work()
    seconds = time.monotonic() - began
    over.set()
    line = {"rows": rows, "pass": what, "seconds": round(seconds, 1), "us_per_row": round(1e6 * seconds / rows, 1)}
    print(json.dumps(line | {"driver_mb": round(peak / 1e6)}), flush=True)
    return found


def drive(data: Path, rows: int, cpus: int) -> None:
    """One size, in a process of its own."""
    import ray

    from pipelines.caption.finish import write_records
    from pipelines.caption.index import build_index
    from pipelines.caption.results import Results, count_work
    from pipelines.formats import open_dataset

    ray.init(num_cpus=cpus, include_dashboard=False, object_store_memory=300 << 20, logging_level="WARNING")
    work = data.parent / "_work"
    measured("index", rows, lambda: build_index(open_dataset(data), work / "index"))
    subprocess.run([sys.executable, __file__, "--record", str(work)], check=True, env=_environment())
    results = Results(work, "recorded")
    todo = measured("count", rows, lambda: count_work(work / "index", results))
    assert todo.rows == todo.done, todo
    output = data.parent / "records"
    facts = measured("finish", rows, lambda: write_records(work / "index", results.tables(), output, 10_000))
    assert facts["rows_out"] == rows and facts["captioned"] == todo.rows, facts


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def main() -> None:
    """Sizes one after another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.record:
        return record_captions(options.record)
    if options.drive:
        return drive(options.drive, options.rows[0], options.cpus)
    for rows in options.rows:
        with tempfile.TemporaryDirectory(prefix="captune-passes-") as name:
            data = Path(name) / "data"
            write_rows(data, rows)
            words = [sys.executable, __file__, "--drive", str(data), "--rows", str(rows), "--cpus", str(options.cpus)]
            subprocess.run(words, check=True, env=_environment())
    return None


if __name__ == "__main__":
    main()
