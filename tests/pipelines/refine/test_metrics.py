"""`captune stats` on records and on any dataset."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.errors import UserError
from pipelines.manifest import open_stage
from pipelines.records import new_record, write_shard
from pipelines.refine import metrics


def test_stats_of_records_shows_every_text_column(tmp_path: Path) -> None:
    record = new_record("image", image=b"x") | {"recaption": "a red sign that says cafe"}
    write_shard(tmp_path / "shard-0.parquet", [record])  # type: ignore[list-item]
    found = metrics.stats(tmp_path)
    assert found["text"] == "recaption" and found["words"] == 6
    assert found["columns"]["caption"]["words"] == 1


def test_stats_of_a_stage_that_has_not_finished_is_refused(tmp_path: Path) -> None:
    """Half of the captions would pass for all of them."""
    stage = open_stage(tmp_path / "captions", "caption", {})
    write_shard(tmp_path / "captions" / "shard-0.parquet", [new_record("image", image=b"x")])
    with pytest.raises(UserError, match="captune caption has not finished"):
        metrics.stats(tmp_path / "captions")
    stage.finish()
    assert metrics.stats(tmp_path / "captions")["text"] == "recaption"


def test_stats_are_of_rows_that_did_not_fail(tmp_path: Path) -> None:
    failed = new_record("lost", image_uri="/gone.jpg", error="missing file: /gone.jpg")
    write_shard(tmp_path / "shard-0.parquet", [failed, new_record("a red sign", image=b"x")])
    found = metrics.stats(tmp_path)
    assert (found["rows"], found["texts"], found["words"], found["mean_words"]) == (2, 1, 3, 3)


def test_stats_reads_any_dataset_and_counts_no_format_tokens(tmp_path: Path) -> None:
    line = {"text": "<__dj__image>\na red sign <|__dj__eoc|>", "images": ["a.jpg"]}
    (tmp_path / "dataset.jsonl").write_text(json.dumps(line) + "\nno json\n")
    found = metrics.stats(tmp_path / "dataset.jsonl")
    assert (found["rows"], found["words"], found["text"]) == (2, 3, "caption")


def test_stats_of_nothing_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        metrics.stats(tmp_path / "nowhere")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="broken.parquet"):
        metrics.stats(tmp_path)
