"""The command that measures a GPU runs: all but the kernels and the clocks is the same on a CPU."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest


@pytest.mark.heavy
def test_every_section_runs_tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No section fails, and what it compares is equal: in float32 the engine says what `generate` says."""
    script = Path(__file__).parent / "gpu.py"
    sections = ["ceilings", "captions", "fp8", "training", "answering"]  # the stage has tests of its own
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", [str(script), "--tiny", "--out", str(tmp_path), "--only", *sections])
    runpy.run_path(str(script), run_name="__main__")
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [line for line in lines if "failed" in line] == []
    found = {line["what"]: line for line in lines}
    equal = found["captions.equal"]
    assert equal["of_generate"] == equal["graphs_of_eager"] == found["answering.equal"]["of_alone"] == 1
    assert found["captions.equal.tower"]["engine"]["apart"] < 1e-6
    assert found["captions.equal.logits"]["engine"]["apart"] < 1e-5
    assert found["training.equal"]["loss_apart"] < 1e-5
    assert {"captions.engine", "captions.generate", "captions.fp8", "training", "answering"} <= set(found)
