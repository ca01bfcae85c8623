"""`captune runs` over finished and half-done runs, and `captune compare` of whole runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ray_jobs import cli

from .synthetic_run import build


@pytest.fixture
def several(finished: Path, tmp_path: Path) -> Path:
    """Three runs side by side: one as it is, one of two seeds, one without its comparison; and a folder of none."""
    runs = tmp_path / "runs"
    shutil.copytree(finished, runs / "first")
    build(tmp_path / "seeds", rows=6, questions=30, seeds=(3, 4)).rename(runs / "seeds")
    shutil.copytree(finished, runs / "half")
    (runs / "half" / "comparison.json").unlink()
    shutil.rmtree(runs / "half" / "enhanced" / "predictions")
    (runs / "notes").mkdir()
    return runs


def test_runs_are_listed_with_result_and_cost(
    several: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table, the JSON and the page have every run, its largest difference and where it stands."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["runs", "--json"]) == 0
    rows = {Path(row["run"]).name: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == {"first", "seeds", "half"}
    found = json.loads((several / "first" / "comparison.json").read_text())["differences"]["enhanced"]
    assert rows["first"]["arm"] == "enhanced" and rows["first"]["difference"] == found["difference"]
    assert rows["first"]["interval"] == found["interval"] and rows["first"]["shown"] == found["excludes_zero"]
    summary = json.loads((several / "seeds" / "comparison.json").read_text())["summary"]["differences"]["enhanced"]
    assert rows["seeds"]["difference"] == summary["mean"] and rows["seeds"]["interval"] == summary["interval"]
    assert rows["half"]["difference"] is None and rows["half"]["stages_done"] < rows["half"]["stages"]
    assert rows["first"]["stages_done"] == rows["first"]["stages"]
    assert cli.main(["runs"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 4 and "not compared yet" in next(line for line in table if line.startswith("half"))
    assert cli.main(["report", str(several / "first")]) == 0
    assert cli.main(["runs", str(several), "--page", str(several / "index.html")]) == 0
    html = (several / "index.html").read_text()
    assert '<a href="first/report/index.html">first</a>' in html and "<script" not in html
    (several / "half" / "recipe.yaml").write_text("a: [")
    (several / "seeds" / "comparison.json").write_text("null")
    capsys.readouterr()
    assert cli.main(["runs", "--json"]) == 0
    told = capsys.readouterr()
    assert [Path(row["run"]).name for row in json.loads(told.out)] == ["first"]
    assert "half cannot be read: " in told.err and "seeds cannot be read: " in told.err
    assert cli.main(["runs", str(several / "notes")]) == 2
    assert "no run in" in capsys.readouterr().err


def test_runs_are_compared_as_they_are(several: Path, tmp_path: Path, capsys: Any) -> None:
    """Every model of both, named after its run; the first is the baseline."""
    argv = ["compare", str(several / "first"), f"other={several / 'half'}", "--output", str(tmp_path / "out"), "--json"]
    assert cli.main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["arms"]) == {"first/original", "first/enhanced", "other/original"}
    assert found["baseline"] == "first/original"
    assert found["differences"]["other/original"]["difference"] == 0
