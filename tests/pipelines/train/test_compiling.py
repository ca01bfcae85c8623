from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.train.compiling import Compiled, compile_layers
from pipelines.train.config import PhaseConfig

PHASE = PhaseConfig(steps=3, learning_rate=1e-3, warmup=0.0)


def _losses(tiny: Any, model_dir: Path, data: Path, compiled: bool) -> list[float]:
    model, method = tiny.learning(model_dir, checkpointing=True)
    engine = tiny.engine(model, model_dir, PHASE, method=method)
    loader = tiny.loader(model_dir, data, "instruct", micro_batch=3)
    first = Compiled(compile_layers(model), "train") if compiled else None
    losses = []
    for step in range(PHASE.steps):

        def take(step: int = step) -> Any:
            return engine.step(loader.step(3 * step), 1e-3)

        losses.append((first.first_step(take, engine.optimizer.zero_grad) if first and not step else take()).loss)
    return losses


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_compiled_layers_give_the_same_losses(
    tiny: Any, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With adapter and checkpointing, on rows of text (the towers' kernels take a CPU minutes to make, and are compared
    by `tests/bench/gpu.py`); and where there is no compiler, training says so in one line and goes on.
    """
    import torch

    data = tiny.write_instructions(tmp_path / "i.json", rows=0, text_only=3)
    plain = _losses(tiny, model_dir, data, compiled=False)
    assert _losses(tiny, model_dir, data, compiled=True) == pytest.approx(plain, rel=1e-5)
    assert "train: first step with compiled layers in" in capsys.readouterr().err
    torch._dynamo.reset()
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    assert _losses(tiny, model_dir, data, compiled=True) == plain
    assert "train: goes on without compiled layers (" in capsys.readouterr().err
    torch._dynamo.reset()
