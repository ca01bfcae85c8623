"""`captune export`: kept records of a stage as another tool's dataset."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.formats import datajuicer, llava, parquet, webdataset
from pipelines.images import BadImage, read_bytes
from pipelines.manifest import require_finished, training_text
from pipelines.records import Record, is_record, shard_paths

FORMATS = ("datajuicer", "llava", "webdataset", "parquet")
_MAGIC = (
    (b"\xff\xd8", ".jpg"),
    (b"\x89PNG", ".png"),
    (b"GIF8", ".gif"),
    (b"BM", ".bmp"),
    (b"II*\0", ".tif"),
    (b"MM\0*", ".tif"),
)


def export(input_dir: Path | str, output_file: Path | str, format: str, text: str = "auto") -> dict[str, Any]:
    """Write the usable records of `input_dir` (no error, not rejected) to `output_file`.

    JSON formats name image files relative to the output file when they lie beside it, else by absolute path; images
    that exist only as bytes are written to `STEM_images/` beside the output file.

    Args:
        format: datajuicer, llava, webdataset or parquet.
        text: column that becomes the text: `caption`, `recaption`, or `auto`, the one that trains (`training_text`).

    Returns:
        `{"rows_in", "written", "left_out", "text", "output"}`.

    Raises:
        UserError: unknown format or column, no records there, or an unfinished stage.
    """
    input_dir, output_file = Path(input_dir), Path(output_file)
    if format not in FORMATS:
        raise UserError(f"--format must be one of {', '.join(FORMATS)}, not '{format}'")
    if text not in ("auto", "caption", "recaption"):
        raise UserError(f"--text must be auto, caption or recaption, not '{text}'")
    require_finished(input_dir)
    if text == "auto":
        text = training_text(input_dir)
    total = sum(1 for _ in _records(input_dir))
    output_file.parent.mkdir(parents=True, exist_ok=True)
    part = output_file.with_name(output_file.name + ".part")
    if format == "parquet":
        written = parquet.write((r for r in _records(input_dir) if _usable(r)), output_file)
    elif format == "webdataset":
        written = webdataset.write(_with_bytes(input_dir, text), part)
    else:
        writer = {"datajuicer": datajuicer.write, "llava": llava.write}[format]
        written = writer(_with_path(input_dir, text, output_file), part)
    if part.exists():
        part.replace(output_file)
    return {"rows_in": total, "written": written, "left_out": total - written, "text": text, "output": str(output_file)}


def _records(input_dir: Path) -> Iterator[Record]:
    """Shard by shard, so that a dataset larger than memory can be exported."""
    for path in shard_paths(input_dir):
        table = _read_shard(path)
        for batch in table.to_batches(max_chunksize=64):
            yield from batch.to_pylist()


def _read_shard(path: Path) -> Any:
    """One shard with a message that names it."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    if not is_record(table.column_names):
        raise UserError(f"{path}: not a shard of sample records")
    return table


def _usable(record: Record) -> bool:
    return record["error"] is None and record["keep"] is not False


def _sample(record: Record, text: str) -> dict[str, Any]:
    return {
        "sample_id": record["sample_id"],
        "caption": record[text] or "",  # type: ignore[literal-required]
        "meta": json.loads(record["meta"] or "{}"),
        "stats": json.loads(record["stats"] or "{}"),
    }


def _with_path(input_dir: Path, text: str, output_file: Path) -> Iterator[dict[str, Any]]:
    base = output_file.absolute().parent
    pictures = output_file.with_name(output_file.stem + "_images")
    for record in filter(_usable, _records(input_dir)):
        uri = record["image_uri"]
        if record["image"] is not None:
            pictures.mkdir(exist_ok=True)
            file = pictures / (record["sample_id"] + _suffix(record["image"]))
            file.write_bytes(record["image"])
            uri = str(file.absolute())
        assert uri is not None  # a usable record has one of the two
        beside = os.path.relpath(uri, base)
        yield {**_sample(record, text), "image_path": uri if beside.startswith("..") else beside}


def _with_bytes(input_dir: Path, text: str) -> Iterator[dict[str, Any]]:
    for record in filter(_usable, _records(input_dir)):
        data = record["image"]
        if data is None:
            try:
                data = read_bytes(record["image_uri"] or "")
            except BadImage as problem:
                raise UserError(
                    f"{problem}: it was there when it was captioned (sample {record['sample_id']})"
                ) from None
        yield {**_sample(record, text), "image": data, "suffix": _suffix(data)}


def _suffix(data: bytes) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ".webp"
    return next((suffix for magic, suffix in _MAGIC if data.startswith(magic)), ".jpg")
