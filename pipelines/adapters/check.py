"""Is this model, or this adapter, what it claims to be? A list of verdicts; nothing is changed.

Each check is a function that yields verdicts; one that cannot run because an earlier one failed is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipelines.adapters import fit, probe, streamed
from pipelines.errors import UserError
from pipelines.mgm.adapter import trained_on
from pipelines.mgm.load import differences, load_config, load_model, load_processor, load_skeleton, quiet
from pipelines.mgm.names import LANGUAGE_MODEL
from pipelines.mgm.parts import generation_config
from pipelines.mgm.skeleton import skeleton
from pipelines.mgm.stored import Stored
from pipelines.mgm.tensorfiles import read_file
from pipelines.modelfiles import ADAPTER, model_identity, weight_files

_SHOWN = 3


@dataclass(frozen=True)
class Verdict:
    """One check's outcome; `detail` says what was found, good or bad."""

    name: str
    passed: bool
    detail: str


def check_model(model: Path | str) -> list[Verdict]:
    """Verdicts on a model directory.

    Raises:
        UserError: there is no such directory.
    """
    model = Path(model)
    if not model.is_dir():
        raise UserError(f"{model}: no such directory")
    return list(_model_verdicts(model))


def check_adapter(adapter: Path | str, model: Path | str) -> list[Verdict]:
    """Verdicts on an adapter directory for the base `model` (whose weights are not loaded).

    Raises:
        UserError: there is no such directory, or the model is not complete.
    """
    adapter, model = Path(adapter), Path(model)
    for path in (adapter, model):
        if not path.is_dir():
            raise UserError(f"{path}: no such directory")
    return list(_adapter_verdicts(adapter, load_skeleton(model), model_identity(model)))


def _verdict(name: str, bad: list[str], good: str) -> Verdict:
    """Passed when nothing bad was found; otherwise the first few of it are shown."""
    more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    return Verdict(name, not bad, f"{', '.join(bad[:_SHOWN])}{more}" if bad else good)


# ------------------------------------------------------------------------------------------------ models


def _model_verdicts(model: Path) -> Iterator[Verdict]:
    try:
        config = load_config(model)
        tensors: dict[str, torch.Tensor] = {}
        for file in weight_files(model):
            tensors.update(read_file(file))
        processor = load_processor(model)
    except UserError as error:
        yield Verdict("files", False, str(error))
        return
    yield Verdict("files", True, f"configuration, processor and {len(tensors)} tensors")
    complete = list(_against_config(config, tensors))
    yield from complete
    yield from _values(tensors, config)
    yield _dtype(config, tensors)
    agreement = _tokenizer(config, processor)
    yield agreement
    if agreement.passed and all(verdict.passed for verdict in complete):
        yield from _behaviour(model, config, processor)


def _against_config(config: Any, tensors: dict[str, torch.Tensor]) -> Iterator[Verdict]:
    found = differences(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    yield _verdict("missing tensors", found.missing, "none")
    yield _verdict("unexpected tensors", found.unexpected, "none")
    yield _verdict("shapes", found.wrong, "as the configuration says")


def _values(tensors: dict[str, torch.Tensor], config: Any) -> Iterator[Verdict]:
    floats = {name: tensor for name, tensor in sorted(tensors.items()) if tensor.is_floating_point()}
    yield _verdict(
        "finite", [name for name, tensor in floats.items() if not tensor.isfinite().all()], "no NaN, no infinity"
    )
    zero = [name for name, tensor in floats.items() if not _may_be_zero(name, tensor, config) and not tensor.any()]
    yield _verdict("all-zero", zero, "no matrix and no norm is all zero")


def _may_be_zero(name: str, tensor: torch.Tensor, config: Any) -> bool:
    """Vectors: a fresh bias, or the weight of Gemma's norm, which stands for one plus itself. Other norms scale."""
    gemma = config.text_config.model_type == "gemma" and name.startswith(LANGUAGE_MODEL)
    return tensor.ndim < 2 and (gemma or not name.endswith(".weight"))


def _dtype(config: Any, tensors: dict[str, torch.Tensor]) -> Verdict:
    found = sorted(
        {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values() if tensor.is_floating_point()}
    )
    claimed = str(config.dtype).removeprefix("torch.") if config.dtype is not None else None
    right = len(found) == 1 and claimed in (None, found[0])
    return Verdict("dtype", right, ", ".join(found) + ("" if right else f"; the configuration says {claimed}"))


def _tokenizer(config: Any, processor: Any) -> Verdict:
    tokenizer, bad = processor.tokenizer, []
    image = tokenizer.convert_tokens_to_ids(processor.image_token)
    if image != config.image_token_id:
        bad.append(
            f"the tokenizer's {processor.image_token} is {image}, the configuration's image_token_id "
            f"{config.image_token_id}"
        )
    if processor.num_image_tokens != config.num_image_tokens:
        bad.append(
            f"the processor writes {processor.num_image_tokens} image tokens, the model makes {config.num_image_tokens}"
        )
    rows = config.text_config.vocab_size
    # The image token is never looked up, so it alone may lie outside of the embedding.
    outside = [token for token, n in tokenizer.get_vocab().items() if n >= rows and n != config.image_token_id]
    if outside:
        bad.append(f"{len(outside)} tokens, e.g. {outside[0]!r}, have no row in the embedding of {rows}")
    if not processor.chat_template:
        bad.append("there is no chat template")
    return _verdict(
        "tokenizer", bad, f"{len(tokenizer)} tokens, image token {image}, {config.num_image_tokens} per image"
    )


def _behaviour(model: Path, config: Any, processor: Any) -> Iterator[Verdict]:
    quiet()
    first, second = (_logits(model, config, probe.batch(processor, seed)) for seed in (1, 2))
    finite = bool(first.isfinite().all())
    change = float((first - second).abs().max())
    seen = finite and change > 1e-6
    yield Verdict(
        "sees the image", seen, f"another image changes a logit by {change:.3g}" if finite else "logits are not finite"
    )
    yield _stops(generation_config(config, model).eos_token_id, processor)


def _logits(model: Path, config: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """In float32, of a model of any size: one tensor is in memory at a time. With an adapter on it, all of it is."""
    if (model / ADAPTER).is_dir():
        return probe.logits(load_model(model, "float32"), inputs)
    return streamed.logits(config, Stored(model, skeleton(config, buffers=True)).__getitem__, inputs, {})


def _stops(stop: Any, processor: Any) -> Verdict:
    """The tokens that end an answer in the chat template must be such that `generate` ends at one of them."""
    stop = set(stop) if isinstance(stop, list) else {stop} - {None}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\N{SNOWMAN}"}]
    end = processor.tokenizer.apply_chat_template(messages, chat_template=processor.chat_template, tokenize=False)
    end_ids = processor.tokenizer(end.split("\N{SNOWMAN}")[-1], add_special_tokens=False)["input_ids"]
    names = [processor.tokenizer.decode([n]) for n in sorted(stop)]
    if not stop & set(end_ids):
        ends = processor.tokenizer.convert_ids_to_tokens(end_ids)
        return Verdict("generation stops", False, f"answers end with {ends}, generation stops at {names or 'nothing'}")
    return Verdict("generation stops", True, f"at {', '.join(names)}")


# ---------------------------------------------------------------------------------------------- adapters


def _adapter_verdicts(adapter: Path, skeleton: Any, base: str) -> Iterator[Verdict]:
    """What `merge` looks at before it merges, and nothing else."""
    try:
        found = fit.look(adapter, skeleton)
        own = trained_on(adapter)
    except UserError as error:
        yield Verdict("files", False, str(error))
        return
    method = found.config.peft_type.value if found.config is not None else "no adapter of PEFT's"
    yield Verdict("files", True, f"{method}; {len(found.modules)} modules, {len(found.whole)} tensors trained whole")
    yield _base(own, base)
    for check, good in fit.CHECKS.items():
        yield _verdict(check, found.faults.get(check, []), good)


def _base(own: str | None, base: str) -> Verdict:
    """Whether the adapter was trained on this very model, and not on one of equal shape."""
    if own not in (base, None):
        return Verdict("base", False, f"trained on another model (identity {own}, this one's is {base})")
    return Verdict("base", True, f"identity {own}" if own else "its files do not say on which model it was trained")
