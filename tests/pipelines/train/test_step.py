from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.errors import UserError, WorkFailed
from pipelines.mgm.load import load_model
from pipelines.mgm.names import PROJECTOR
from pipelines.train import features
from pipelines.train.config import LoraSettings, PhaseConfig
from pipelines.train.data import Sampler, Share
from pipelines.train.log import TrainLog, read_log
from pipelines.train.step import learning_rate
from tests.pipelines import tiny_mgm

PHASE = PhaseConfig(steps=12, learning_rate=5e-3, warmup=0.0, max_grad_norm=1.0)


def _aligning(model_dir: Path, *, checkpointing: bool = False) -> Any:
    return tiny_mgm.learning(model_dir, "align", checkpointing=checkpointing)[0]


def _losses(
    tiny: Any, model: Any, model_dir: Path, loader: Any, precision: str = "float32", steps: int = 12
) -> list[float]:
    engine = tiny.engine(model, model_dir, PHASE, precision)
    return [engine.step(batches, learning_rate(PHASE, n)).loss for n, batches in enumerate(loader.steps(0, steps))]


def test_align_trains_projector_and_uni_modules_only(tiny: Any, model_dir: Path, tmp_path: Path) -> None:
    """After some steps exactly these tensors differ from the base model, and the loss fell."""
    model, base = _aligning(model_dir), load_model(model_dir, "float32").state_dict()
    data = tiny.write_dataset(tmp_path / "data")
    losses = _losses(tiny, model, model_dir, tiny.loader(model_dir, data, "align", template="plain"))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, base[name])}
    prefixes = {name.split(".")[1] for name in changed}
    assert prefixes == {"multi_modal_projector", "uni_query", "uni_key", "uni_value"}
    assert losses[-1] < losses[0] - 0.02


def test_instruct_trains_lora_and_projector_only(tiny: Any, model_dir: Path, tmp_path: Path) -> None:
    """The language model's own weights and both towers stay; every LoRA B has moved; the loss fell."""
    model, _ = tiny.learning(model_dir, "instruct", checkpointing=True, lora=LoraSettings(rank=4))
    base = load_model(model_dir, "float32").state_dict()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or ".uni_" in name or "multi_modal_projector" in name for name in trainable)
    assert sum("lora_A" in name for name in trainable) == 2 * 7
    losses = _losses(
        tiny, model, model_dir, tiny.loader(model_dir, tiny.write_instructions(tmp_path / "i.json"), "instruct")
    )
    state = model.state_dict()
    kept = {name: name.replace(".base_layer", "") for name in state if name not in trainable}
    assert sum(".base_layer." in name for name in kept) == 2 * 7 and set(kept.values()) <= set(base)
    for name, plain in kept.items():
        assert torch.equal(state[name], base[plain]), name
    assert all(tensor.any() for name, tensor in state.items() if "lora_B" in name)
    assert losses[-1] < losses[0] - 0.1


def test_instruct_may_leave_the_projector_alone(tiny: Any, model_dir: Path) -> None:
    """`instruct.learn: [language_model]`: LoRA is all that learns."""
    model, _ = tiny.learning(model_dir, "instruct", instruct=PhaseConfig(learn=["language_model"]))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 2 * 7 and all("lora_" in name for name in trainable)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"q_proj", "matches no module.*model.language_model.layers.0"),
        (r".*\.q_proj", r"outside of the language model, e.g. model.vision_tower"),
        (r"(", "is not a regular expression"),
        (r"model\.language_model\.layers\.\d+\.self_attn", r"no linear layer, e.g. \S+\.self_attn, a GemmaAttention"),
        (r"model\.language_model\.norm", "a GemmaRMSNorm"),
    ],
)
def test_wrong_lora_targets_are_errors(tiny: Any, model_dir: Path, pattern: str, message: str) -> None:
    """A leaf name, a pattern that also hits the CLIP tower, and no pattern at all."""
    with pytest.raises(UserError, match=message):
        tiny.learning(model_dir, "instruct", lora=LoraSettings(target_modules=pattern))


def test_accumulation_equals_one_big_batch(tiny: Any, model_dir: Path, tmp_path: Path) -> None:
    """Rows of unequal length: four micro-batches of two weigh every token as one batch of eight does."""
    data = tiny.write_instructions(tmp_path / "i.json", rows=8, text_only=4)
    results = []
    for micro, accumulation in ((8, 1), (2, 4)):
        model = _aligning(model_dir)
        loader = tiny.loader(model_dir, data, "instruct", micro_batch=micro, accumulation=accumulation)
        engine = tiny.engine(model, model_dir, PHASE)
        step = engine.step(loader.step(0), 1e-2)
        results.append((step, engine.weights()))
    (big, big_weights), (small, small_weights) = results
    assert small.counts.samples == big.counts.samples == 8
    assert small.loss == pytest.approx(big.loss, rel=1e-5) and small.grad_norm == pytest.approx(big.grad_norm, rel=1e-4)
    for name, tensor in big_weights.items():
        torch.testing.assert_close(small_weights[name], tensor, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_cached_features_give_the_same_losses(tiny: Any, model_dir: Path, tmp_path: Path, precision: str) -> None:
    """Encoding each image once is an optimization and nothing else."""
    from pipelines.train.step import autocast

    data, losses = tiny.write_dataset(tmp_path / "data", rows=10, broken=1), []
    for cached in (False, True):
        model, loader = _aligning(model_dir), tiny.loader(model_dir, data, "align")
        if cached:
            normalize = _normalize(model_dir)
            context = autocast(torch.device("cpu"), precision)
            loader.features = features.fill(
                model.model, normalize, loader, partial(loader.images, 0, 12), 1 << 30, context
            )
            assert len(loader.features.slots) == 10 and list(loader.features.bad.values()) == ["not an image"]
        losses.append(_losses(tiny, model, model_dir, loader, precision))
        assert len(loader.rows.broken) == 1
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6 if precision == "float32" else 2e-3, atol=0)


def test_the_substitute_for_a_broken_picture_is_encoded_too(tiny: Any, model_dir: Path, tmp_path: Path) -> None:
    """Half of the pictures are broken, and one step shows four of the rows: those that come in their place have
    features, as without a cache; and a restart, which knows what is broken, has the very same bits.
    """
    data, model = tiny.write_dataset(tmp_path / "data", rows=6, broken=6), _aligning(model_dir)
    plain, first, again = (tiny.loader(model_dir, data, "align", seed=3) for _ in range(3))
    (expected,) = plain.step(0)
    named = {row.images[0] for row in (plain.rows.rows[index] for index in plain.indices(0, 1))}
    caches = []
    for loader in (first, again):
        shown = partial(loader.images, 0, 1)
        loader.features = features.fill(model.model, _normalize(model_dir), loader, shown, 1 << 30, nullcontext)
        (found,) = loader.step(0)
        assert torch.equal(found.input_ids, expected.input_ids)
        parts = features.tower_outputs(model.model, *_normalize(model_dir)(expected.pixels))
        for part, reference in zip(found.features, parts, strict=True):
            torch.testing.assert_close(part, reference)
        caches.append(loader.features)
        again.rows.broken.update(first.rows.broken)
    assert not set(caches[0].slots) <= named and len(caches[0].bad) > 1
    assert caches[0].slots == caches[1].slots and caches[0].bad == caches[1].bad
    assert all(torch.equal(a, b) for a, b in zip(caches[0].parts, caches[1].parts, strict=True))


def _normalize(model_dir: Path) -> Any:
    from pipelines.mgm.load import load_processor

    return load_processor(model_dir).image_processor.normalize


def test_features_that_do_not_fit_are_not_kept(tiny: Any, model_dir: Path, tmp_path: Path) -> None:
    """The memory limit decides from shapes, which are those of the outputs, before any image is encoded."""
    model, loader = _aligning(model_dir), tiny.loader(model_dir, tiny.write_dataset(tmp_path / "data"), "align")
    parts = features.tower_outputs(model.model, torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 64, 64))
    assert features.output_bytes(model.model, torch.float32) == sum(part.nbytes for part in parts) / 2

    def fails(pixels: torch.Tensor) -> Any:
        raise AssertionError("an image was prepared")

    assert features.fill(model.model, fails, loader, partial(loader.images, 0, 3), 1000, nullcontext) is None


def test_a_batch_without_images_gives_the_projector_a_gradient_of_zero(
    tiny: Any, model_dir: Path, tmp_path: Path
) -> None:
    """ZeRO-3 and DDP count on a gradient of every parameter; a missing one would be an earlier micro-batch's."""
    model, _ = tiny.learning(model_dir, "instruct")
    data = tiny.write_instructions(tmp_path / "i.json", rows=0, text_only=2)
    engine = tiny.engine(model, model_dir, PHASE)
    (batch,) = tiny.loader(model_dir, data, "instruct", micro_batch=2, accumulation=1).step(0)
    assert batch.pixels is None
    loss = engine.forward(batch)
    loss.backward()
    plain = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    assert float(loss.detach()) == pytest.approx(float(plain.detach()) * batch.targets, rel=1e-6)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in gradients.values())
    assert {bool(g.any()) for name, g in gradients.items() if name.startswith(PROJECTOR)} == {False}
    assert any(bool(g.any()) for name, g in gradients.items() if "lora_B" in name)


def test_tower_outputs_lead_to_the_models_own_features(model_dir: Path) -> None:
    """features.py splits `get_image_features` at the towers; both halves together must be the whole."""
    torch.manual_seed(0)
    model = load_model(model_dir, "float32").model
    pixels, aux = torch.randn(3, 3, 32, 32), torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        whole = model.get_image_features(pixels, aux)
        halves = features.image_features(model, features.tower_outputs(model, pixels, aux))
    assert torch.equal(whole, halves)


def test_gradient_checkpointing_changes_no_number(tiny: Any, model_dir: Path, tmp_path: Path) -> None:
    """Recomputing activations saves memory; the losses are the same."""
    data = tiny.write_dataset(tmp_path / "data")
    losses = [
        _losses(tiny, _aligning(model_dir, checkpointing=c), model_dir, tiny.loader(model_dir, data, "align"), steps=4)
        for c in (False, True)
    ]
    assert losses[0] == losses[1]


def test_a_loss_that_is_no_number_stops_the_run(tiny: Any, model_dir: Path, tmp_path: Path) -> None:
    """NaN is reported as such, and the weights are not updated with it."""
    model = _aligning(model_dir)
    model.model.multi_modal_projector[0].weight.data.fill_(float("nan"))
    loader = tiny.loader(model_dir, tiny.write_dataset(tmp_path / "data"), "align")
    with pytest.raises(WorkFailed, match="loss became nan"):
        tiny.engine(model, model_dir, PHASE).step(loader.step(0), 1e-3)


def test_schedule_rises_and_falls() -> None:
    """Warm-up reaches the peak, the cosine ends near zero."""
    phase = PhaseConfig(steps=100, learning_rate=1.0, warmup=0.1)
    rates = [learning_rate(phase, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[10] == 1.0 and rates[-1] < 1e-3
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_the_log_of_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    """Lines after the checkpoint and a line cut short by the kill go; TensorBoard's curves follow."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def line(phase: str, step: int, loss: float) -> dict[str, Any]:
        return {"phase": phase, "step": step, "loss": loss, "grad_norm": 1.0, "learning_rate": 1e-3} | {
            "samples_per_second": 1.0,
            "seconds": 1.0,
        }

    first = TrainLog(tmp_path, {})
    for step in (1, 2, 3, 4):
        first.write(line("align", step, loss=step))
    first.close()
    with (tmp_path / "log.jsonl").open("a") as stream:
        stream.write('{"phase": "align", "st')
    second = TrainLog(tmp_path, {"align": 2})
    for step in (3, 4):
        second.write(line("align", step, loss=10 * step))
    second.close()
    assert [(entry["step"], entry["loss"]) for entry in read_log(tmp_path)] == [(1, 1), (2, 2), (3, 30), (4, 40)]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("align/loss")] == [(1, 1), (2, 2), (3, 30), (4, 40)]


def test_held_out_rows_are_apart_and_measuring_them_changes_nothing(tiny: Any, model_dir: Path, tmp_path: Path) -> None:
    """Their loss is the one of a single batch in evaluation mode, however they are dealt out; training with dropout
    goes on as if nobody had looked.
    """
    from pipelines.train.held_out import set_aside

    data = tiny.write_instructions(tmp_path / "i.json", rows=30, text_only=10)
    loader = tiny.loader(model_dir, data, "instruct")
    rows, every = loader.rows, {row.name for row in loader.rows.rows}
    held = set_aside(rows, 3)
    assert len(held) == 3 and {row.name for row in held.rows} | {row.name for row in rows.rows} == every
    assert len(rows) == len(every) - 3
    loader.sampler = Sampler(len(rows), seed=0, phase="instruct")
    again = tiny.loader(model_dir, data, "instruct", seed=1).rows
    assert [row.name for row in set_aside(again, 3).rows] == [row.name for row in held.rows]
    assert len(set_aside(again, 100)) == 3  # every tenth row at most

    def fresh() -> Any:
        torch.manual_seed(7)
        settings = LoraSettings(rank=4, dropout=0.5)
        model, _ = tiny.learning(model_dir, "instruct", checkpointing=True, lora=settings)
        return tiny.engine(model, model_dir, PHASE)

    engine = fresh()
    engine.step(loader.step(0), 1e-2)
    aside = tiny.loader(model_dir, data, "instruct")
    aside.rows = held
    dealt = []
    for worker in range(3):
        aside.share = Share(worker, 3, 2, 1)
        dealt.append(aside.every_row())
    assert [[batch.samples for batch in batches] for batches in dealt] == [[2], [1], [1]]
    assert [batches[0].targets > 0 for batches in dealt] == [True, True, False]
    aside.share = Share(0, 1, 8, 1)
    whole = engine.evaluate(aside.every_row())
    assert engine.evaluate([batch for batches in dealt for batch in batches]) == pytest.approx(whole, rel=1e-6)
    towers, shown = engine.forward.model.model, aside.every_image
    aside.features = features.fill(towers, _normalize(model_dir), aside, shown, 1 << 30, nullcontext)
    assert len(aside.features.slots) == len(held.rows) and all(batch.pixels is None for batch in aside.every_row())
    assert engine.evaluate(aside.every_row()) == pytest.approx(whole, rel=1e-6)

    results = []
    for looks in (False, True):
        engine = fresh()
        for batches in loader.steps(0, 3):
            engine.step(batches, 1e-2)
            if looks:
                assert math.isfinite(engine.evaluate(dealt[0]))
        results.append(engine.weights())
    assert all(torch.equal(results[1][name], tensor) for name, tensor in results[0].items())


def test_rows_of_one_image_are_held_out_together(tmp_path: Path) -> None:
    from pipelines.train.held_out import set_aside
    from pipelines.train.rows import Row, Rows

    def rows() -> Rows:
        turns = (("user", "<image>\nwhat?"), ("assistant", "that"))
        return Rows("x", [Row(str(n), turns, (str(tmp_path / f"{n // 2}.jpg"),)) for n in range(100)])

    for count in range(1, 11):
        learned = rows()
        held = set_aside(learned, count)
        assert len(held) == count // 2 * 2
        assert not {row.images for row in held.rows} & {row.images for row in learned.rows}
