"""`captune export`: kept records of a stage as another tool's dataset."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.files import replacing
from pipelines.formats import datajuicer, llava, parquet, webdataset
from pipelines.images import BadImage, read_bytes, suffix_of
from pipelines.manifest import CLAIM, require_finished, training_text
from pipelines.records import SAME_PICTURE, Record, is_record, shard_paths

FORMATS = ("datajuicer", "llava", "webdataset", "parquet")
_BATCH = 16  # records held decoded at a time


def export(input_dir: Path | str, output_file: Path | str, format: str, text: str = "auto") -> dict[str, Any]:
    """Write the usable records of `input_dir` (no error, not rejected) to `output_file`, a few of them in memory at a
    time.

    JSON formats name image files relative to the output file when they lie beside it, else by absolute path; images
    that exist only as bytes are written to `STEM_images/` beside the output file. Parquet holds its images; an output
    that is not named `*.parquet` is a folder of shards.

    Args:
        format: datajuicer, llava, webdataset or parquet.
        text: column that becomes the text: `caption`, `recaption`, or `auto`, the one that trains (`training_text`).

    Returns:
        `{"rows_in", "written", "left_out", "text", "output"}`.

    Raises:
        UserError: unknown format or column, no records there, an unfinished stage, or an output among a stage's own
            shards or in a folder that holds something.
    """
    input_dir, output_file = Path(input_dir), Path(output_file)
    if format not in FORMATS:
        raise UserError(f"--format must be one of {', '.join(FORMATS)}, not '{format}'")
    if text not in ("auto", "caption", "recaption"):
        raise UserError(f"--text must be auto, caption or recaption, not '{text}'")
    require_finished(input_dir)
    if text == "auto":
        text = training_text(input_dir)
    total = sum(_open_shard(path).metadata.num_rows for path in shard_paths(input_dir))
    if format == "parquet":
        _refuse_mixing(output_file)
        written = parquet.write(_with_bytes(input_dir, text), output_file)
    else:
        with replacing(output_file) as part:
            if format == "webdataset":
                written = webdataset.write(_with_bytes(input_dir, text), part)
            else:
                writer = {"datajuicer": datajuicer.write, "llava": llava.write}[format]
                written = writer(_with_path(input_dir, text, output_file), part)
    return {"rows_in": total, "written": written, "left_out": total - written, "text": text, "output": str(output_file)}


def _refuse_mixing(output: Path) -> None:
    """Shards beside other shards would be read as one dataset."""
    if output.suffix == ".parquet":
        if (output.parent / CLAIM).exists():
            raise UserError(f"--output {output}: a captune stage keeps its own shards in this folder; choose another")
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: Parquet goes to an empty folder, or to a file named *.parquet")


def _records(input_dir: Path) -> Iterator[Record]:
    """Page by page, so that a dataset larger than memory can be exported."""
    for path in shard_paths(input_dir):
        for batch in _open_shard(path).iter_batches(batch_size=_BATCH, use_threads=False):
            yield from batch.to_pylist()


def _open_shard(path: Path) -> Any:
    """One shard with a message that names it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        shard = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: not a readable Parquet shard of sample records ({error})") from error
    if not is_record(shard.schema_arrow.names):
        raise UserError(f"{path}: not a shard of sample records")
    return shard


def _usable(record: Record) -> bool:
    return record["error"] is None and record["keep"] is not False


def _sample(record: Record, text: str) -> dict[str, Any]:
    meta = json.loads(record["meta"] or "{}")
    meta.pop(SAME_PICTURE, None)  # of these records, and of nobody else's
    return {
        "sample_id": record["sample_id"],
        "caption": record[text] or "",  # type: ignore[literal-required]
        "meta": meta,
        "stats": json.loads(record["stats"] or "{}"),
    }


def _with_path(input_dir: Path, text: str, output_file: Path) -> Iterator[dict[str, Any]]:
    base = output_file.absolute().parent
    pictures = output_file.with_name(output_file.stem + "_images")
    for record in filter(_usable, _records(input_dir)):
        uri = record["image_uri"]
        if record["image"] is not None:
            pictures.mkdir(exist_ok=True)
            file = pictures / (record["sample_id"] + suffix_of(record["image"]))
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
        yield {**_sample(record, text), "image": data, "suffix": suffix_of(data)}
