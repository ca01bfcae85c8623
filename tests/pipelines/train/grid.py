"""What one process of a group does in test_equality.py: every training of the table, one after the other.

Processes of a group meet over a file, without Ray; a group of one makes the references too.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from pipelines.mgm.load import load_model, load_processor, quiet
from pipelines.train import step, zero
from pipelines.train.config import LoraSettings, PhaseConfig, TrainConfig
from pipelines.train.data import IGNORE, Example, Loader, Sampler, Share, Templates
from pipelines.train.methods import make_learn
from pipelines.train.rows import Row, read_rows

BATCH, STEPS, CLIP = 8, 2, 0.15
STRATEGIES, PHASES, ROWS, WORKERS, MICRO_BATCHES = (
    ("ddp", "zero2", "zero3"),
    ("align", "instruct"),
    ("with", "without", "mixed"),
    (1, 2),
    (4, 2),
)
SILENT = "teaches nothing"
CPU = torch.device("cpu")


class Cell(NamedTuple):
    """One training of the table; `plain` is the reference, one process that sees a step's samples at once."""

    strategy: str
    workers: int
    micro_batch: int
    phase: str
    rows: str

    @property
    def accumulation(self) -> int:
        return BATCH // (self.micro_batch * self.workers)


def cells(workers: int) -> list[Cell]:
    """What a group of so many processes trains; the mixed rows in small micro-batches too."""
    kinds = [
        (*kind, m)
        for kind in product(STRATEGIES, PHASES, ROWS)
        for m in (MICRO_BATCHES if kind[2] == "mixed" else MICRO_BATCHES[:1])
    ]
    found = [Cell(strategy, workers, m, phase, rows) for strategy, phase, rows, m in kinds]
    return [*references(), *found] if workers == 1 else found


def references() -> list[Cell]:
    return [reference(*kind) for kind in product(PHASES, ROWS)]


def reference(phase: str, rows: str) -> Cell:
    return Cell("plain", 1, BATCH, phase, rows)


class InOrder(Sampler):
    """The rows as they lie in the file: the test decides which micro-batch shows no image."""

    def _shuffle(self, epoch: int) -> list[int]:
        return list(range(self.rows))


class Grid:
    def __init__(self, model: Path, data: Path, rank: int, workers: int) -> None:
        self.data, self.rank, self.workers = data, rank, workers
        self.base, self.processor = load_model(model, "float32"), load_processor(model)
        self.templates = Templates(self.processor, 512)

    def train(self, cell: Cell) -> dict[str, Any]:
        """Losses and gradient norms of the steps, and what is left: weights, and AdamW's mean of the gradients."""
        micro_batch, accumulation = cell.micro_batch, cell.accumulation
        # some pieces a batch, where the reference has all targets at once
        step.LOGIT_BYTES = 1 << 30 if cell.strategy == "plain" else 1 << 14
        phase = PhaseConfig(STEPS, learning_rate=1e-3, warmup=0.0, max_grad_norm=CLIP, accumulation=accumulation)
        engine = self._engine(cell, replace(phase, micro_batch=micro_batch))
        loader = self._loader(cell.phase, cell.rows, Share(self.rank, self.workers, micro_batch, accumulation))
        steps = [engine.step(b, step.learning_rate(phase, n)) for n, b in enumerate(loader.steps(0, STEPS))]
        assert all(result.counts.samples == BATCH for result in steps)
        found = {"loss": [s.loss for s in steps], "grad_norm": [s.grad_norm for s in steps]}
        found |= {"weights": engine.weights(), "gradients": gradients(engine)}
        engine.close()
        return found

    def _engine(self, cell: Cell, phase: PhaseConfig) -> step.Engine:
        lora = LoraSettings(rank=4, dropout=0.0)
        config = TrainConfig(align=phase, instruct=phase, lora=lora, precision="float32")
        model, phase = copy.deepcopy(self.base), config.phase(cell.phase)
        method = make_learn(model, phase, config)
        step.prepare(model, checkpointing=True)
        forward = step.TrainForward(model, self.processor.image_processor.normalize, method)
        if not cell.strategy.startswith("zero"):
            return step.TorchEngine(forward, phase, "float32", CPU)
        engine = zero.ZeroEngine(forward, int(cell.strategy[-1]), phase, "float32", CPU)
        assert ({tuple(p.shape) for p in model.parameters()} == {(0,)}) == (cell.strategy == "zero3")
        return engine

    def _loader(self, phase: str, rows: str, share: Share) -> Loader:
        def encode(row: Row) -> Example:
            example = getattr(self.templates, phase)(row)
            if row.turns[-1][1] == SILENT:
                example.labels.fill_(IGNORE)
            return example

        found = read_rows(self.data / f"{rows}.json")
        resize, pad = self.processor.image_processor.resize, self.processor.tokenizer.pad_token_id
        return Loader(found, encode, resize, InOrder(len(found), 0, phase), share, pad)


def gradients(engine: step.Engine) -> dict[str, torch.Tensor]:
    """AdamW's mean of the clipped gradients: linear in them, where its updates are steps of one size."""
    if isinstance(engine, step.TorchEngine):
        return {name: engine.optimizer.state[p]["exp_avg"] for name, p in engine.named.items()}
    from deepspeed.utils import safe_get_full_optimizer_state

    if isinstance(engine, zero.ZeroEngine) and engine.engine.zero_optimization_stage() == 2:
        # DeepSpeed links states to parameters after the first group's first step, when the second group has none yet.
        engine.engine.optimizer._hp_optimizer_states_linked = False
        engine.engine.optimizer._lazy_init_hp_params_optimizer_state()
    return {name: safe_get_full_optimizer_state(p, "exp_avg").clone() for name, p in engine.named.items()}


def given_away(*arguments: Any) -> dict[str, Any]:
    """Every parameter really leaves its worker between its uses: tiny ones would stay, as no large one does."""
    config = _config(*arguments)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config


_config = zero.deepspeed_config


def main(model: str, data: str, out: str, rank: int, workers: int) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    quiet()
    zero.deepspeed_config = given_away
    dist.init_process_group("gloo", init_method=f"file://{out}/meeting-{workers}", rank=rank, world_size=workers)
    grid = Grid(Path(model), Path(data), rank, workers)
    results = {tuple(cell): grid.train(cell) for cell in cells(workers)}
    if rank == 0:
        torch.save(results, Path(out) / f"{workers}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))
