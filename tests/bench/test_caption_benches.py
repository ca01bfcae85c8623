"""The GPU benchmark's command runs, in its size for any machine; nothing is timed here."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest


def test_gpu_benchmark_runs_tiny(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every part of it: the engine from JPEG, its modules, plain `generate`, Data-Juicer's settings."""
    script = Path(__file__).parent / "bench_caption_engine_gpu.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--tiny", "--images", "24", "--threads", "2"])
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    for part in (
        "engine, from JPEG",
        "ViT",
        "Q-Former",
        "prefill",
        "decode",
        "plain generate",
        "Data-Juicer's settings",
    ):
        assert part in printed
