"""The rows that a forecast is made from: the same ones wherever they lie, and a part of those of a larger part."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.errors import UserError
from pipelines.formats import open_dataset
from pipelines.ladder.rows import draw
from pipelines.records import read_shards
from pipelines.sample.config import SampleConfig
from pipelines.sample.world import write_world


def test_rows_are_drawn_by_what_they_are(tmp_path: Path) -> None:
    """A quarter is a part of a half; read again as a dataset it is whole, broken rows and their errors included."""
    write_world(tmp_path, SampleConfig(pairs=120, instructions=1, questions=1), models=False)
    dataset = str(tmp_path / "dataset.jsonl")
    facts = {part: draw(dataset, tmp_path / f"part{part}", part, 0) for part in (1, 2, 4)}
    ids = {part: set(read_shards(tmp_path / f"part{part}", ["sample_id"])["sample_id"].to_pylist()) for part in facts}
    assert facts[4]["rows_in"] == 120 == facts[1]["rows_out"] and facts[4]["rows_out"] == len(ids[4])
    assert ids[4] < ids[2] < ids[1] and 15 <= len(ids[4]) <= 45
    again = list(open_dataset(tmp_path / "part1").rows())
    assert len(again) == 120 and sum(row.error is not None for row in again) >= 1
    lines = (tmp_path / "dataset.jsonl").read_text().splitlines()
    (tmp_path / "turned.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    draw(str(tmp_path / "turned.jsonl"), tmp_path / "turned", 4, 0)
    assert set(read_shards(tmp_path / "turned", ["sample_id"])["sample_id"].to_pylist()) == ids[4]
    with pytest.raises(UserError, match="holds the output of another run"):
        draw(dataset, tmp_path / "part4", 8, 0)
