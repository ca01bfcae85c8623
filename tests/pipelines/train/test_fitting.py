"""A step that does not fit: the same step in smaller pieces, or one clear message."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.errors import WorkFailed
from pipelines.train import fitting
from pipelines.train.config import LoraSettings, PhaseConfig, TrainConfig
from pipelines.train.fitting import split

PHASE = PhaseConfig(learning_rate=5e-3, micro_batch=8)


class Small(torch.nn.Module):
    """A model on a device that holds only so many rows at a time: more raise what CUDA's allocator raises, in the
    middle of the language model, when the memory of the layers before is taken.
    """

    def __init__(self, layer: torch.nn.Module, rows: int) -> None:
        super().__init__()
        self.layer, self.rows, self.seen = layer, rows, []

    def forward(self, hidden: torch.Tensor, *given: Any, **named: Any) -> Any:
        self.seen.append(len(hidden))
        if len(hidden) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.layer(hidden, *given, **named)


def _engine(tiny: Any, model_dir: Path, rows: int = 8, dropout: float = 0.0) -> tuple[Any, Small]:
    model, _ = tiny.learning(model_dir, "instruct", lora=LoraSettings(rank=4, dropout=dropout))
    small = Small(model.model.language_model.layers[1], rows)
    model.model.language_model.layers[1] = small
    return tiny.engine(model, model_dir, PHASE), small


def test_a_step_that_does_not_fit_is_the_same_step_in_halves(tiny: Any, model_dir: Path, tmp_path: Path) -> None:
    """Rows with and without images: loss, gradient norm, counts and weights of the whole batch; later steps are cut
    before they fail.
    """
    data = tiny.write_instructions(tmp_path / "i.json", rows=5, text_only=3)
    loader = tiny.loader(model_dir, data, "instruct", micro_batch=8)
    results = []
    for rows in (8, 3):
        engine, small = _engine(tiny, model_dir, rows)
        steps = [engine.step(batches, 5e-3) for batches in loader.steps(0, 2)]
        results.append((steps, {name.replace(".layer.", "."): value for name, value in engine.weights().items()}))
    assert engine.cut == 2 and small.seen == [8, 4, *[2] * 8]
    (whole, weights), (halves, cut_weights) = results
    for one, other in zip(whole, halves, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-5) and other.counts == one.counts
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
    for name, tensor in weights.items():
        torch.testing.assert_close(cut_weights[name], tensor, rtol=1e-3, atol=2e-4)


def test_cached_features_follow_their_rows(tiny: Any, model_dir: Path, tmp_path: Path) -> None:
    """Tower outputs in place of pixels are cut as pixels are."""
    from contextlib import nullcontext

    from pipelines.mgm.load import load_processor
    from pipelines.train import features

    normalize = load_processor(model_dir).image_processor.normalize
    data, losses = tiny.write_instructions(tmp_path / "i.json", rows=5, text_only=3), []
    for rows in (8, 1):
        loader = tiny.loader(model_dir, data, "instruct", micro_batch=8)
        engine, _ = _engine(tiny, model_dir, rows)
        model = engine.forward.model.model
        loader.features = features.fill(model, normalize, loader, partial(loader.images, 0, 1), 1 << 30, nullcontext)
        losses.append(engine.step(loader.step(0), 0.0).loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_dropout_draws_again_as_at_first(tiny: Any, model_dir: Path, tmp_path: Path) -> None:
    """A step done again in halves has the numbers of one that was cut from the start, and no two pieces one mask."""
    data = tiny.write_instructions(tmp_path / "i.json", rows=8)
    loader, losses = tiny.loader(model_dir, data, "instruct", micro_batch=8), []
    for cut in (None, 4):
        engine, _ = _engine(tiny, model_dir, rows=4, dropout=0.5)
        engine.cut = cut
        torch.manual_seed(3)
        for name, parameter in engine.named.items():
            if "lora_B" in name:
                parameter.data.normal_()  # with zeros dropout would change nothing
        losses.append(engine.step(loader.step(0), 0.0).loss)
    assert losses[0] == losses[1]
    (batch,) = loader.step(0)
    assert len({piece.seed for piece in split(batch, 4, 0, 16)}) == 2


def test_one_sample_that_does_not_fit_ends_the_run(tiny: Any, model_dir: Path, tmp_path: Path) -> None:
    """With a message that says where the sizes stand, and no gradient left behind."""
    data = tiny.write_instructions(tmp_path / "i.json", rows=8)
    engine, _ = _engine(tiny, model_dir, rows=0)
    with pytest.raises(WorkFailed, match="not even a micro-batch of one sample fits.*dry-run"):
        engine.step(tiny.loader(model_dir, data, "instruct", micro_batch=8).step(0), 1e-3)
    assert all(parameter.grad is None for parameter in engine.named.values())


def test_workers_of_deepspeed_start_again_with_half(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Out of memory within a step of ZeRO leaves half the micro-batch to the next start, down to one sample; then the
    message, until a person starts again. The step stays the same.
    """
    from pipelines.train.job import Job
    from pipelines.train.worker import Run, State

    phase = PhaseConfig(batch=24, micro_batch=6)
    config = TrainConfig(strategy="zero3", workers=2, instruct=phase).settled()
    config = replace(config, instruct=phase.settled("instruct", 2))
    run = Run.__new__(Run)  # without Ray around it
    run.job, run.config, run.workers = Job("m", "b", str(tmp_path), config, {}, "train", tracker={}), config, 2
    run.state = State(phase="instruct", phases={"instruct": {"batch": 24}})
    for size in (3, 1):
        run.stepping = run._fitting("instruct")
        assert run.leave_smaller() and run.leave_smaller()  # both workers, one after the other
        found = run._fitting("instruct")
        assert (found.micro_batch, found.accumulation, found.batch) == (size, 12 // size, 24)
        told = f"micro-batches of {size}, {12 // size} a step (the same 24 samples a step)"
        assert capsys.readouterr().err.count(told) == 1
    run.stepping = run._fitting("instruct")
    assert run.leave_smaller() is False
    with pytest.raises(WorkFailed, match="not even a micro-batch of one sample fits"):
        run._fitting("instruct")
    fitting.try_again(tmp_path)
    assert run._fitting("instruct").micro_batch == 6


def _worker(rank: int, model_dir: str, data: str, scratch: str) -> None:
    """One of two; the second has the smaller device, and its first step fails when half of it is done."""
    import torch.distributed as dist

    from tests.pipelines import tiny_mgm as tiny

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{scratch}/rendezvous", rank=rank, world_size=2)
    engine, small = _engine(tiny, Path(model_dir), rows=2 if rank else 8)
    loader = tiny.loader(Path(model_dir), Path(data), "instruct", micro_batch=4, accumulation=4)
    mine = [loader.step(position)[rank::2] for position in (0, 16)]
    results = [engine.step(batches, 5e-3) for batches in mine]
    numbers = [(result.loss, result.grad_norm, result.counts.samples) for result in results]
    torch.save((numbers, engine.cut, small.seen, engine.weights()), f"{scratch}/{rank}.pt")


@pytest.mark.heavy
def test_all_workers_go_on_in_halves_when_one_runs_out_of_memory(tiny: Any, model_dir: Path, tmp_path: Path) -> None:
    """Nobody waits for the one that failed; both have the weights that one process has."""
    data = tiny.write_instructions(tmp_path / "i.json", rows=7, text_only=9)
    torch.multiprocessing.spawn(_worker, (str(model_dir), str(data), str(tmp_path)), nprocs=2)
    (numbers, cut, seen, weights), other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert cut == other[1] == 2 and seen == [4, 4, *[2] * 8] and other[2] == [4, *[2] * 8]
    engine, _ = _engine(tiny, model_dir)
    loader = tiny.loader(model_dir, data, "instruct", micro_batch=4, accumulation=4)
    alone = [engine.step(loader.step(position), 5e-3) for position in (0, 16)]
    for (loss, norm, samples), other_numbers, result in zip(numbers, other[0], alone, strict=True):
        assert (loss, norm, samples) == other_numbers and samples == result.counts.samples == 16
        assert loss == pytest.approx(result.loss, rel=1e-5) and norm == pytest.approx(result.grad_norm, rel=1e-4)
    for name, tensor in engine.weights().items():
        assert torch.equal(weights[name], other[3][name])
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=2e-4)
