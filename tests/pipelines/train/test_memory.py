"""Memory that is said before, against memory that was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.mgm.configuration import MGMConfig
from pipelines.train.activations import Micro
from pipelines.train.config import LoraSettings, PhaseConfig, TrainConfig
from pipelines.train.memory import GIB, WORKSPACE, Phase

MEASURED = Path(__file__).parents[2] / "bench" / "results" / "h100-training.jsonl"
TEXT, TARGETS = 150, 75
"""Of a row in tests/bench/gpu_sections/training.py: words, and how many of them are targets."""


@lru_cache
def _mgm_2b(checkpointing: bool) -> Phase:
    """What the benchmark trains: the defaults' LoRA, projector and uni-modules on MGM-2B's geometry in bf16."""
    config = TrainConfig(gradient_checkpointing=checkpointing)
    return Phase(MGMConfig(dtype="bfloat16"), config, "instruct")


def _lines() -> list[dict[str, Any]]:
    lines = map(json.loads, MEASURED.read_text().splitlines())
    return [line for line in lines if line["what"] == "training"]


@pytest.mark.parametrize("line", _lines(), ids=lambda line: f"{line['micro_batch']}-{line['checkpointing']}")
def test_the_peak_is_the_measured_one(line: dict[str, Any]) -> None:
    """Every line of the benchmark on an H100, within 3 %: micro-batches, with and without checkpointing; compiled
    layers keep no more.
    """
    phase, rows = _mgm_2b(line["checkpointing"]), line["micro_batch"]
    length = phase.model_config.num_image_tokens + TEXT
    found = phase.predict(Micro(rows, length, TARGETS * rows, rows, padded=False), accumulating=False)
    assert found.tensors / GIB == pytest.approx(line["peak_gib"], rel=0.03)


def test_what_is_left_out_takes_less_and_what_is_added_more() -> None:
    """Cached features leave out the towers, checkpointing the layers; more rows, workers that share, and stages of
    ZeRO go where they should.
    """
    kept, again = _mgm_2b(False), _mgm_2b(True)
    micro = Micro(4, 726, 300, 4)
    plain = kept.predict(micro, accumulating=True)
    assert again.predict(micro, accumulating=True).tensors < plain.tensors
    cached = kept.predict(replace(micro, encoded=False), accumulating=True)
    assert cached.towers == 0 < plain.towers and cached.activations == plain.activations
    two, eight = (again.predict(replace(micro, rows=n, images=n), accumulating=True).tensors for n in (2, 8))
    assert two < eight
    shares = {}
    for strategy in ("zero2", "zero3"):
        config = TrainConfig(strategy=strategy, workers=4)
        shares[strategy] = Phase(MGMConfig(dtype="bfloat16"), config, "instruct").predict(micro, accumulating=True)
    assert shares["zero2"].optimizer < plain.optimizer and shares["zero2"].weights == pytest.approx(
        plain.weights, rel=0.1
    )
    assert shares["zero3"].weights < 0.3 * plain.weights


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_on_the_cpu_takes_what_is_said(tiny: Any, tmp_path: Path, precision: str, checkpointing: bool) -> None:
    """A real step through the real engine, every allocation counted: the peak within 15 % of the prediction, at a
    geometry in which activations and logits, not weights, are most of it.
    """
    directory = tiny.write_model(tmp_path / "model", layers=4, hidden=128)
    settings = {"lora": LoraSettings(rank=4, dropout=0.0), "precision": precision,
                "gradient_checkpointing": checkpointing}  # fmt: skip
    data = tiny.write_instructions(tmp_path / "i.json", rows=8)
    loader = tiny.loader(directory, data, "instruct", micro_batch=8)
    model, method = tiny.learning(directory, "instruct", checkpointing=checkpointing, lora=settings["lora"])
    engine = tiny.engine(model, directory, PhaseConfig(learning_rate=1e-3), precision, method)
    (batch,) = loader.step(0)
    engine.step([batch], 1e-3)  # AdamW's moments are there from now on
    peak = _peak_of(lambda: engine.step([batch], 1e-3))
    stored = MGMConfig.from_pretrained(directory)
    stored.dtype = torch.float32
    phase = Phase(stored, TrainConfig(**settings), "instruct")
    phase.numbers = replace(phase.numbers, cuda=False)
    micro = Micro(8, batch.input_ids.shape[1], batch.targets, 8, padded=False)
    found = phase.predict(micro, accumulating=False)
    held = found.weights + found.optimizer + WORKSPACE
    assert peak == pytest.approx(found.tensors - held, rel=0.15), found


def _peak_of(work: Any) -> int:
    """Most bytes that were allocated at a time by `work`, beyond what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    now = most = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
