"""`captune caption --dry-run`: what a run would cost, from a look at the whole input and a measurement on a small
sample of it. No Ray.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

from pipelines.blip2 import checkpoint
from pipelines.blip2.pixels import PixelSpec
from pipelines.caption.config import CaptionConfig
from pipelines.caption.guards import all_failed
from pipelines.caption.replica import load_engine
from pipelines.caption.reservoir import Reservoir
from pipelines.errors import UserError, WorkFailed
from pipelines.formats import Dataset, Row, error_kind, open_dataset
from pipelines.images import BadImage, decode, read_bytes
from pipelines.progress import clock
from pipelines.storage import files_in

SAMPLE = 64
_COUNT_SECONDS = 60.0
_ACTORS = (1, 2, 4, 8, 16, 32)


def estimate(input: str, config: CaptionConfig) -> dict[str, Any]:
    """Measure a sample and extrapolate; nothing is written.

    Returns:
        rows (and rows_exact: false when counting would have taken more than a minute), bytes (encoded images),
        sample: rows, failed (share that has no usable picture), decode_ms (per image and CPU core), caption_ms (per
            image and actor), device, pixels (bytes of one image in the object store);
        memory_per_actor: bytes of one replica's process, or of GPU memory when it runs there;
        actors: list of actors, hours, images_per_second, decode_cpus (cores that keep so many actors fed).

    Raises:
        UserError: no dataset, no row in it, no model.
        WorkFailed: not one row of the sample has a usable picture, so that a run would end in failure.
    """
    dataset = open_dataset(input, config.reading)
    model = checkpoint.resolve(config.model)
    checkpoint.check(model, config.prompt, config.max_new_tokens)
    spec = checkpoint.pixel_spec(model, config.resize)
    counted = _count(dataset)
    if not counted["rows"]:
        raise UserError(f"{input}: this dataset has no rows")
    pixels, looked, errors = _decode(counted.pop("sampled"), spec)
    if not len(pixels):
        kinds = Counter(map(error_kind, errors))
        raise WorkFailed(f"{input}, a random sample of {len(errors)} rows: {all_failed(kinds, errors[0])}")
    measured = _caption(model, config, pixels)
    rows, caption_ms = counted["rows"], measured.pop("caption_ms")
    if counted["bytes"] is None:  # files by name: their mean size times their number
        counted["bytes"] = round(rows * looked["mean_bytes"])
    return {
        "input": input,
        "format": dataset.format,
        **counted,
        "sample": {
            **looked,
            "caption_ms": caption_ms,
            "device": measured.pop("device"),
            "pixels": spec.row_bytes,
        },
        **measured,
        "actors": _table(rows * (1 - looked["failed"]), caption_ms, looked["decode_ms"], config),
    }


def _count(dataset: Dataset) -> dict[str, Any]:
    """Rows, image bytes where rows carry them (None where they name files), and a random sample of rows."""
    sampled: Reservoir[Row] = Reservoir(SAMPLE, seed=0)
    rows = held = 0
    until = time.monotonic() + _COUNT_SECONDS
    for row in dataset.rows():
        rows += 1
        held += len(row.image or b"")
        sampled.offer(row)
        if rows % 256 == 0 and time.monotonic() > until:
            return _extrapolated(dataset, rows, held) | {"sampled": sampled.items}
    return {"rows": rows, "rows_exact": True, "bytes": held or None, "sampled": sampled.items}


def _extrapolated(dataset: Dataset, rows: int, held: int) -> dict[str, Any]:
    """Shards that hold their images: rows by the bytes read so far; else no more is known than that there are so
    many.
    """
    total = sum(part.stat().st_size for part in _local_files(dataset)) if held else 0
    share = min(1.0, held / total) if total else 1.0
    return {"rows": round(rows / share), "rows_exact": False, "bytes": round(held / share) or None}


def _local_files(dataset: Dataset) -> list[Path]:
    path = dataset.path
    files = dataset.parts if isinstance(path, str) else files_in(path, "*.*")
    return [file for file in files if isinstance(file, Path)]


def _decode(rows: list[Row], spec: PixelSpec) -> tuple[Any, dict[str, Any], list[str]]:
    """uint8 (B, 3, H, W) of the usable pictures, what decoding them took, and the errors of the others."""
    import numpy as np

    found, sizes, seconds, errors = [], [], [], []
    for row in rows:
        if row.error is not None:
            errors.append(row.error)
            continue
        started = time.perf_counter()
        try:
            data = row.image if row.image is not None else read_bytes(row.image_uri or "")
            found.append(spec.pixels(decode(data, max_side=spec.draft_side)))
        except BadImage as problem:
            errors.append(f"{problem} ({row.where})")
            continue
        seconds.append(time.perf_counter() - started)
        sizes.append(len(data))
    warm = seconds[1:] or seconds or [0.0]  # the first one pays for loading the decoders
    took = {
        "rows": len(rows),
        "failed": round(len(errors) / len(rows), 4),
        "mean_bytes": round(sum(sizes) / len(sizes)) if sizes else 0,
        "decode_ms": round(1e3 * sum(warm) / len(warm), 3),
    }
    return np.stack(found) if found else np.empty((0, 3, spec.height, spec.width), np.uint8), took, errors


def _caption(model: Path, config: CaptionConfig, pixels: Any) -> dict[str, Any]:
    """Time and memory of the real model on the sample, after a first batch that warms it up."""
    import psutil
    import torch

    on_gpu = config.gpus_per_actor > 0 and torch.cuda.is_available()
    engine = load_engine(model, config, on_gpu=on_gpu)
    engine.caption(pixels[: engine.batch_size])
    started = time.perf_counter()
    engine.caption(pixels)
    seconds = time.perf_counter() - started
    memory = torch.cuda.max_memory_reserved() if on_gpu else psutil.Process().memory_info().rss
    return {
        "caption_ms": round(1e3 * seconds / len(pixels), 3),
        "memory_per_actor": int(memory),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    }


def _table(rows: float, caption_ms: float, decode_ms: float, config: CaptionConfig) -> list[dict[str, float]]:
    wished = {config.actors, config.max_actors or config.actors}
    return [
        {
            "actors": actors,
            "hours": round(rows * caption_ms / actors / 3.6e6, 4),
            "images_per_second": round(1e3 * actors / caption_ms, 2),
            "decode_cpus": round(actors * decode_ms / caption_ms, 2),
        }
        for actors in sorted({*_ACTORS, *wished})
    ]


def describe(found: dict[str, Any]) -> str:
    """The estimate for a person."""
    sample, exact = found["sample"], "" if found["rows_exact"] else "about "
    lines = [
        f"{found['input']} ({found['format']}): {exact}{found['rows']:,} rows, {_size(found['bytes'] or 0)} of images",
        f"sample of {sample['rows']}: {100 * sample['failed']:.0f} % unusable, {_size(sample['mean_bytes'])} an image, "
        f"{sample['decode_ms']:.1f} ms to read and decode one on one core",
    ]
    lines += [
        f"model: {sample['caption_ms']:.1f} ms an image on one actor ({sample['device']}), "
        f"{_size(found['memory_per_actor'])} per actor",
        "",
        f"{'actors':>8} {'images/s':>10} {'time':>10} {'cores to decode':>17}",
    ]
    lines += [
        f"{row['actors']:>8} {row['images_per_second']:>10.1f} {clock(3600 * row['hours']):>10} "
        f"{row['decode_cpus']:>17.1f}"
        for row in found["actors"]
    ]
    return "\n".join(lines)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
