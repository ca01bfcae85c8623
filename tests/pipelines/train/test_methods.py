from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.errors import UserError
from pipelines.train.config import METHODS, AdaLoraSettings, LoraSettings, PhaseConfig, TrainConfig
from pipelines.train.methods import group_of
from pipelines.train.step import learning_rate

PHASE = PhaseConfig(steps=8, learning_rate=1e-2, warmup=0.0, accumulation=2, micro_batch=2)


def _run(
    tiny: Any, model_dir: Path, data: Path, method: str, *, steps: int = 8, resume: Path | None = None, **settings: Any
) -> tuple[list[float], dict[str, torch.Tensor], Any]:
    """Losses, trained weights and the engine of a few steps on the same rows; `resume` stops half-way and goes on."""
    losses, weights, engine = [], {}, None
    for first, last in ((0, steps),) if resume is None else ((0, steps // 2), (steps // 2, steps)):
        model, how = tiny.learning(model_dir, method=method, instruct=PHASE, **settings)
        with torch.no_grad():
            own = dict(model.named_parameters())
            for name, tensor in weights.items():
                own[name].copy_(tensor)
        engine = tiny.engine(model, model_dir, PHASE, method=how)
        if first:
            engine.load(resume)
        loader = tiny.loader(model_dir, data, "instruct", micro_batch=2, accumulation=2)
        for step in range(first, last):
            losses.append(engine.step(loader.step(0), learning_rate(PHASE, step)).loss)
        weights = engine.weights()
        if resume is not None and not first:
            engine.save(resume)
    return losses, weights, engine


@pytest.fixture(scope="module")
def data(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tiny.write_instructions(tmp_path_factory.mktemp("data") / "instruct.json", rows=6, text_only=2)
    return path


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_continues(tiny: Any, model_dir: Path, data: Path, tmp_path: Path, method: str) -> None:
    """The loss falls, towers stay, and a run that stopped half-way ends in the very bits of one that did not."""
    losses, weights, _ = _run(tiny, model_dir, data, method)
    assert losses[-1] < losses[0] - 0.005
    assert {group_of(name) for name in weights} == {"projector", "uni_modules", "language_model"}
    again, found, _ = _run(tiny, model_dir, data, method, resume=tmp_path)
    assert again == losses
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("method", ["prefix", "adalora", "dora"])
def test_recomputing_activations_changes_no_number(tiny: Any, model_dir: Path, data: Path, method: str) -> None:
    """Of the methods that do more than LoRA in a layer: a prefix is read twice, and is not lost."""
    plain, weights, _ = _run(tiny, model_dir, data, method, steps=3)
    saving, same, _ = _run(tiny, model_dir, data, method, steps=3, checkpointing=True)
    assert plain == saving and all(torch.equal(same[name], tensor) for name, tensor in weights.items())


def test_a_prefix_is_what_peft_makes_of_it(tiny: Any, model_dir: Path, data: Path) -> None:
    """The loss of plain PEFT with the same prefix, on rows of unequal length."""
    from peft import PrefixTuningConfig, get_peft_model

    from pipelines.mgm.load import load_model

    model, how = tiny.learning(model_dir, method="prefix")
    engine = tiny.engine(model, model_dir, PHASE, method=how)
    (batch,) = tiny.loader(model_dir, data, "instruct", micro_batch=6).step(0)
    loss = float(engine.forward(batch).detach()) / batch.targets
    config = PrefixTuningConfig(num_virtual_tokens=16, task_type="CAUSAL_LM")
    plain = get_peft_model(load_model(model_dir, "float32"), config)
    plain.prompt_encoder["default"].embedding.weight.data.copy_(model.prompt_encoder.embedding.weight)
    pixels, aux = engine.forward.normalize(batch.pixels)
    expected = plain(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        labels=batch.labels,
        pixel_values=pixels,
        pixel_values_aux=aux,
    ).loss
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)


def test_adalora_moves_its_ranks(tiny: Any, model_dir: Path, data: Path) -> None:
    """From six everywhere to four on average, more where the gradients ask for it, and zero elsewhere."""
    settings = AdaLoraSettings(warmup=0.1, final=0.3)
    _, weights, engine = _run(tiny, model_dir, data, "adalora", adalora=settings)
    ranks = engine.method.ranks()
    assert len(ranks) == 14 and len(set(ranks.values())) > 1
    assert sum(ranks.values()) == 4 * len(ranks)
    assert engine.method.figures() == {"rank": 4, "rank_least": min(ranks.values()), "rank_most": max(ranks.values())}
    singular = {name: tensor for name, tensor in weights.items() if ".lora_E." in name}
    assert {name.split(".lora_")[0]: int((tensor != 0).sum()) for name, tensor in singular.items()} == ranks


def test_a_group_learns_at_its_own_rate(tiny: Any, model_dir: Path, data: Path) -> None:
    """With a rate next to nothing the projector stays where it was while LoRA moves."""
    config = TrainConfig(instruct=PhaseConfig(rates={"projector": 1e-12}, learning_rate=1e-2, warmup=0.0, steps=4))
    phase = config.phase("instruct")
    assert phase.rates == {"projector": 1e-12, "uni_modules": 1e-2, "language_model": 1e-2}
    model, how = tiny.learning(model_dir)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    engine = tiny.engine(model, model_dir, phase, method=how)
    engine.step(tiny.loader(model_dir, data, "instruct").step(0), learning_rate(phase, 0))
    moved = dict.fromkeys(phase.rates, 0.0)
    for name, parameter in engine.named.items():
        moved[group_of(name)] = max(moved[group_of(name)], float((parameter.detach() - before[name]).abs().max()))
    assert moved["projector"] < 1e-9 < 1e-3 < min(moved["uni_modules"], moved["language_model"])


def test_rates_follow_the_scripts_where_none_is_given() -> None:
    """LLaVA's and MGM's: 1e-3 for alignment, 2e-4 for LoRA with 2e-5 for the projector, 2e-5 for a whole model."""
    assert TrainConfig().phase("align").rates == {"projector": 1e-3, "uni_modules": 1e-3}
    assert TrainConfig().phase("instruct").rates == {"projector": 2e-5, "uni_modules": 2e-5, "language_model": 2e-4}
    assert set(TrainConfig(method="full").phase("instruct").rates.values()) == {2e-5}
    assert TrainConfig(align=PhaseConfig(learn=["projector"])).phase("align").rates == {"projector": 1e-3}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "lorra"}, "train.method must be one of lora, rslora"),
        ({"method": "qlora", "strategy": "zero3"}, "qlora trains with strategy ddp only"),
        ({"instruct": PhaseConfig(learn=["tower"])}, "train.instruct: learn and rates name some of .*, not 'tower'"),
        ({"instruct": PhaseConfig(learn=[])}, "at least one has to learn"),
        ({"align": PhaseConfig(schedule="step")}, "train.align.schedule must be one of cosine, linear, constant"),
        ({"method": "adalora", "lora": LoraSettings(rank=8), "adalora": AdaLoraSettings(initial_rank=8)}, "above"),
    ],
)
def test_impossible_settings_name_their_key(settings: dict[str, Any], message: str) -> None:
    """Before anything starts."""
    with pytest.raises(UserError, match=message):
        TrainConfig(**settings)


@pytest.mark.parametrize(("schedule", "middle", "last"), [("linear", 0.5, 0.01), ("constant", 1.0, 1.0)])
def test_other_schedules(schedule: str, middle: float, last: float) -> None:
    """Linear reaches zero, constant stays."""
    phase = PhaseConfig(steps=100, learning_rate=1.0, warmup=0.0, schedule=schedule)
    assert learning_rate(phase, 50) == pytest.approx(middle) and learning_rate(phase, 99) == pytest.approx(last)
