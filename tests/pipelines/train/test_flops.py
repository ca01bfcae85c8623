"""FLOPs by formula, against PyTorch's own counter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipelines.mgm.configuration import MGMConfig
from pipelines.train import flops
from pipelines.train.config import PhaseConfig
from pipelines.train.step import Counts, count

CPU = torch.device("cpu")


def _counted(work: Any) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def test_towers_are_counted_to_the_flop(tiny: Any, model_dir: Path) -> None:
    """Both towers' products, convolutions and attention."""
    model, _ = tiny.learning(model_dir, "align")
    model.model.vision_tower.set_attn_implementation("eager")  # the counter knows no fused attention of a CPU
    views, aux = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert _counted(lambda: model.model.encode_images(views, aux)) == 2 * flops.towers(model.config)


@pytest.mark.parametrize("phase", ["align", "instruct"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_step_is_what_the_counter_counts(tiny: Any, model_dir: Path, tmp_path: Path, phase: str, method: str) -> None:
    """Forward and backward pass through the engine, rows of equal length: within 3 %."""
    model, learns = tiny.learning(model_dir, phase, method=method)
    for part in (model.model.vision_tower, model.model.language_model):
        part.set_attn_implementation("eager")
    data = tiny.write_instructions(tmp_path / "i.json", rows=4)
    engine = tiny.engine(model, model_dir, PhaseConfig(learning_rate=1e-3), method=learns)
    batches = tiny.loader(model_dir, data, "instruct", micro_batch=4).step(0)
    found = _counted(lambda: engine.step(batches, 0.0))
    assert flops.step_flops(model, count(batches, CPU)) == pytest.approx(found, rel=0.03)


def test_mgm_2b_is_as_large_as_it_is_known_to_be() -> None:
    """CLIP-L/336 takes 0.36 TFLOP an image, ConvNeXt-L at 768 pixels 0.8; nothing on a CPU has a peak."""
    assert flops.towers(MGMConfig()) == pytest.approx(1.17e12, rel=0.05)
    assert flops.peak_flops(CPU) is None
    assert Counts(1, 2, 3, 4, 5) + Counts(1, 1, 1, 1, 1) == Counts(2, 3, 4, 5, 6)
