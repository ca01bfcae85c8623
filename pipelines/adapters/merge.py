"""Base + adapter + weights trained without LoRA -> one plain Hugging Face directory.

Nothing is believed: the merged model must give the logits of base + adapter, and every tensor of the written files is
compared with what it has to be. Otherwise nothing stays on disk.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from pipelines.adapters import probe
from pipelines.adapters.config import MergeConfig, decides
from pipelines.errors import UserError, WorkFailed
from pipelines.manifest import identity, open_stage, require_finished
from pipelines.mgm.adapter import WEIGHTS, has_lora, read_whole, towers_trained, trained_on
from pipelines.mgm.directory import check_model_directory
from pipelines.mgm.load import load_model, load_processor, quiet
from pipelines.mgm.modeling import MGMForConditionalGeneration
from pipelines.mgm.names import TOWERS
from pipelines.mgm.tensorfiles import read_file
from pipelines.modelfiles import load_complete, model_identity, weight_files
from pipelines.progress import say


def run(
    model: Path | str, adapter: Path | str, output: Path | str, config: MergeConfig, *, restart: bool = False
) -> dict[str, Any]:
    """Merge `adapter` into `model`.

    Returns:
        The manifest, with the largest logit difference found.

    Raises:
        UserError: adapter and model do not belong together, or one of them is not complete.
        WorkFailed: the merged model differs from base + adapter; nothing was written.
    """
    model, adapter, output = Path(model).resolve(), Path(adapter).resolve(), Path(output).resolve()
    require_finished(adapter)
    has_lora(adapter)
    check_model_directory(model)
    base = model_identity(model)
    if not config.any_base:
        _refuse_other_base(adapter, model, base)
    stage = open_stage(output, "merge", decides(base, identity(adapter), config), restart=restart)
    if stage.complete:
        return stage.manifest
    say(f"merge: {adapter} into {model}")
    quiet()
    try:
        facts = _merge(model, adapter, output, config)
    except Exception:
        shutil.rmtree(output)  # half a model must never look like one
        raise
    say(f"merge: logits agree within {facts['max_logit_difference']:.2g} ({facts['merged_tensors']} tensors merged)")
    return stage.finish(**facts)


def _refuse_other_base(adapter: Path, model: Path, base: str) -> None:
    """Another model of equal shape would merge without a word, and answer nonsense."""
    own = trained_on(adapter)
    if own not in (base, None):
        raise UserError(
            f"{adapter}: was trained on another model than {model} (identity {own}, not {base}); name the model that "
            "it was trained on, or pass --merge.any_base true if this one is meant"
        )


def _merge(model: Path, adapter: Path, output: Path, config: MergeConfig) -> dict[str, Any]:
    dtype = stored_dtype(model) if config.dtype == "auto" else getattr(torch, config.dtype)
    processor = load_processor(model)
    inputs = probe.batch(processor)
    tuned = with_adapter(model, adapter)
    expected = probe.logits(tuned, inputs)
    merged = merge_lora(tuned)
    difference = _difference(probe.logits(merged, inputs), expected)
    if not difference <= config.tolerance:
        raise WorkFailed(
            f"the merged logits differ from base + adapter by {difference:.3g} (merge.tolerance {config.tolerance:g}); "
            "nothing written"
        )
    merged = merged.to(dtype)
    merged.config.dtype = dtype
    merged.save_pretrained(output)
    processor.save_pretrained(output)
    changed = compare_files(model, output, dtype, merged, meant=set(read_whole(adapter)))
    # Not by `load_model`, which refuses what is not finished.
    again = load_complete(MGMForConditionalGeneration, output, dtype=torch.float32)
    written = _difference(probe.logits(again, inputs), expected)
    if dtype == torch.float32 and not written <= config.tolerance:
        raise WorkFailed(f"the written model's logits differ from base + adapter by {written:.3g}; nothing kept")
    return {
        "max_logit_difference": difference,
        "max_logit_difference_as_written": written,
        "tolerance": config.tolerance,
        "dtype": str(dtype).removeprefix("torch."),
        "merged_tensors": changed,
        "lora": has_lora(adapter),
    }


def stored_dtype(model: Path) -> torch.dtype:
    """Dtype of a model directory's weights."""
    from safetensors import safe_open

    for file in weight_files(model):
        with safe_open(file, framework="pt") as tensors:
            names = tensors.keys()
            if names:
                return tensors.get_tensor(names[0]).dtype  # type: ignore[no-any-return]
    raise UserError(f"{model}: its files hold no tensors")


def with_adapter(model: Path, adapter: Path) -> Any:
    """The base model in float32 with everything the adapter directory holds, LoRA still apart.

    Raises:
        UserError: a tensor of the adapter has no place in this model, or another shape.
    """
    base = load_model(model, "float32")
    towers = towers_trained(adapter)
    own = dict(base.named_parameters())
    for name, tensor in read_whole(adapter).items():
        if name not in own:
            raise UserError(f"{adapter}: trained tensor {name} has no place in {model}")
        if own[name].shape != tensor.shape:
            raise UserError(f"{adapter}: {name} is {tuple(tensor.shape)}, the model's is {tuple(own[name].shape)}")
        if name.startswith(TOWERS) and not towers:
            raise UserError(f"{adapter}: holds {name}, but towers are never trained here")
        own[name].data.copy_(tensor)
    if not has_lora(adapter):
        return base
    from peft import PeftModel, get_peft_model_state_dict

    try:
        tuned = PeftModel.from_pretrained(base, str(adapter))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{adapter}: PEFT cannot load it onto {model} ({error})") from error
    # PEFT only warns about tensors that it did not find or could not place.
    wanted, found = set(get_peft_model_state_dict(tuned)), set(read_file(adapter / WEIGHTS))
    if wanted != found:
        name = sorted(wanted ^ found)[0]
        raise UserError(
            f"{adapter}: {len(wanted - found)} adapter tensors missing, {len(found - wanted)} unexpected, e.g. {name}"
        )
    return tuned


def merge_lora(tuned: Any) -> Any:
    """The plain model with LoRA's update added to its weights."""
    return tuned.merge_and_unload(safe_merge=True) if hasattr(tuned, "merge_and_unload") else tuned


def compare_files(model: Path, output: Path, dtype: torch.dtype, merged: Any, meant: Collection[str] = ()) -> int:
    """Check every written tensor; returns how many differ from the base model's.

    Args:
        meant: names that the adapter brings whole: the only ones that may differ in a tower.

    Raises:
        WorkFailed: names differ, a file does not hold the merged tensor, a tower changed or an embedding came untied.
    """
    # As files hold it: in memory, transformers keeps all experts of a Mixtral layer in one tensor.
    before, after, state = _tensors(model), _tensors(output), revert_weight_conversion(merged, merged.state_dict())
    if set(before) != set(after):
        raise WorkFailed(
            f"the merged model's tensors differ in name from the base's, e.g. {sorted(set(before) ^ set(after))[0]}"
        )
    changed = 0
    for name, tensor in after.items():
        if not torch.equal(tensor, state[name].to(dtype)):
            raise WorkFailed(f"{name} was not written as it was merged")
        same = torch.equal(tensor, before[name].to(dtype))
        if not same and name.startswith(TOWERS) and name not in meant:
            raise WorkFailed(f"{name} changed, but towers must stay bit-identical to the base model's")
        changed += not same
    embeddings, head = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
    if merged.config.tie_word_embeddings and embeddings.data_ptr() != head.data_ptr():
        raise WorkFailed("the embeddings are tied in the base model, but not in the merged one")
    return changed


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in weight_files(directory):
        found.update(read_file(file))
    return found


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference; NaN anywhere gives NaN, which no tolerance admits."""
    return float((a - b).abs().max())
