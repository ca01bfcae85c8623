"""The GPU benchmark is a ready command: everything in it but the kernels runs on a CPU."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("static", [False, True])
def test_it_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, static: bool) -> None:
    out = tmp_path / "rows.json"
    options = ["--tiny", "--batches", "1", "3", "--rounds", "1", "--text-tokens", "10", "--json", str(out)]
    script = Path(__file__).parent / "bench_mgm_gpu.py"
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", [str(script), *options, *(["--static"] if static else [])])
    runpy.run_path(str(script), run_name="__main__")
    rows = json.loads(out.read_text())["rows"]
    assert [row["batch"] for row in rows] == [1, 3]
    assert all(row["questions_per_second"] > 0 and row["share_of_matrix_peak"] > 0 for row in rows)
    assert rows[0]["tflop_per_question"] == pytest.approx(rows[1]["tflop_per_question"], rel=0.01)
