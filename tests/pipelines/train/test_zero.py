"""ZeRO-3 without Ray: one process, and every parameter really given away between its uses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_SCRIPT = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist

from pipelines.mgm.load import load_processor
from pipelines.train import zero
from pipelines.train.config import PhaseConfig
from pipelines.train.step import TrainForward
from tests.pipelines import tiny_mgm as tiny

torch.set_num_threads(1)
model_dir, data, scratch = (Path(argument) for argument in sys.argv[1:])
phase = PhaseConfig(steps=3, learning_rate=1e-3, micro_batch=2, accumulation=2)
dist.init_process_group("gloo", init_method=f"file://{scratch}/rendezvous", rank=0, world_size=1)
plain = zero.deepspeed_config

def given_away(*arguments):
    config = plain(*arguments)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config

zero.deepspeed_config = given_away
results = []
for strategy in ("ddp", "zero3"):
    model, _ = tiny.learning(model_dir, "instruct", checkpointing=True)
    loader = tiny.loader(model_dir, data, "instruct", micro_batch=2, accumulation=2)
    if strategy == "ddp":
        engine = tiny.engine(model, model_dir, phase)
    else:
        forward = TrainForward(model, load_processor(model_dir).image_processor.normalize)
        engine = zero.ZeroEngine(forward, 3, phase, "float32", torch.device("cpu"))
        shapes = {tuple(p.shape) for p in model.parameters()}
        assert shapes == {(0,)}, f"not sharded: {shapes}"
    steps = [engine.step(batches, 1e-3) for batches in loader.steps(0, phase.steps)]
    results.append((steps, engine.weights()))
(steps, weights), (zero_steps, zero_weights) = results
for a, b in zip(steps, zero_steps, strict=True):
    assert abs(a.loss - b.loss) < 1e-4 and abs(a.grad_norm - b.grad_norm) < 1e-3 * max(1, a.grad_norm), (a, b)
assert set(weights) == set(zero_weights)
for name, tensor in weights.items():
    assert zero_weights[name].shape == tensor.shape, name
    torch.testing.assert_close(zero_weights[name], tensor, rtol=1e-2, atol=1e-4)
print("equal")
"""


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_parameters_that_are_given_away_come_back(tiny: Any, model_dir: Path, tmp_path: Path) -> None:
    """Tiny parameters normally stay on every worker; here none does, as with a large model. Losses, gradient norms and
    gathered weights equal plain training: nothing reads a weight that is not there (mining reads weights directly),
    and nothing is left over from an earlier micro-batch where one shows no image.
    """
    data = tiny.write_instructions(tmp_path / "instruct.json", rows=3, text_only=5)
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(model_dir), str(data), str(tmp_path)],
        cwd=Path(__file__).parents[3],
        env=os.environ | {"OMP_NUM_THREADS": "1", "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "equal" in done.stdout
