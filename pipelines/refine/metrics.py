"""`captune stats`: what the captions of any dataset are like. What is counted, and how, `pipelines.text` says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.formats import DEFAULT, Reading, open_dataset
from pipelines.manifest import MANIFEST, read_json, require_finished, training_text
from pipelines.records import holds_records, read_shards
from pipelines.text import text_metrics, usable_texts


def stats(input: Path | str, reading: Reading = DEFAULT) -> dict[str, Any]:
    """Metrics of a dataset: those of its training text at the top, those of every text column under `columns`.

    The training text of records is what `manifest.training_text` says, of any other dataset the caption as found.

    Args:
        reading: how a dataset is read that is no records.

    Raises:
        UserError: nothing readable at `input`, or a stage that has not finished.
    """
    directory = Path(input)
    require_finished(directory)
    is_records = directory.is_dir() and holds_records(directory)
    text = training_text(directory) if is_records else "caption"
    columns = dict(_record_texts(directory, text)) if is_records else {"caption": _dataset_texts(input, reading)}
    metrics = {name: text_metrics(texts) for name, texts in columns.items()}
    result: dict[str, Any] = {}
    if is_records and (directory / MANIFEST).exists():
        manifest = read_json(directory / MANIFEST)
        result = {key: manifest[key] for key in ("rows_in", "kept", "rejected", "retention") if key in manifest}
    return {"input": str(input), "text": text, **metrics[text], **result, "columns": metrics}


def _record_texts(directory: Path, training: str) -> Iterator[tuple[str, list[str | None]]]:
    """Caption, training text, and any other text column that holds something; a row without a text counts as one
    without words.
    """
    table = read_shards(directory, columns=["sample_id", "caption", "recaption", "error"])
    errors = table["error"].to_pylist()
    for name in ("caption", "recaption"):
        if name in ("caption", training) or table[name].null_count < table.num_rows:
            yield name, usable_texts(table[name].to_pylist(), errors)


def _dataset_texts(input: Path | str, reading: Reading) -> list[str | None]:
    return [None if row.error else row.caption for row in open_dataset(input, reading).rows()]
