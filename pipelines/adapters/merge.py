"""Base + adapter -> one plain Hugging Face directory, of a model of any size: one tensor is in memory at a time.

Nothing is believed. PEFT merges each module, by its own code, and:

- every tensor of the written files is compared with what it has to be, and towers with the base's;
- the logits of base + adapter (PEFT's layers called, not merged) are compared with those of the merged weights, in
  float32, on an image and a question and on a question alone. Both models are run a module at a time (`streamed`), the
  first from the base's files, the second from the merged weights before they are rounded to the dtype of the files;
- the files are run the same way a third time, to say what the rounding did.

A learned prefix has no weight to go into: the model's directory carries the adapter then, beside the base's own files,
and captune loads both.

Otherwise nothing stays on disk. Files are mapped, not read, so peak memory is the adapter, a few copies of the largest
parameter in float32 and the probe's activations, whatever the size of the model.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipelines.adapters import fit, probe, streamed
from pipelines.adapters.config import MergeConfig, decides
from pipelines.adapters.unmerged import with_adapter
from pipelines.errors import UserError, WorkFailed
from pipelines.manifest import identity, open_stage, require_finished
from pipelines.mgm.adapter import CONFIG as PEFT_CONFIG
from pipelines.mgm.adapter import WEIGHTS as PEFT_WEIGHTS
from pipelines.mgm.adapter import has_lora, trained_on
from pipelines.mgm.directory import check_plain_directory
from pipelines.mgm.load import (
    check_tensors,
    differences,
    is_quantized,
    load_config,
    load_processor,
    load_skeleton,
    quiet,
)
from pipelines.mgm.names import HEAD, TOWERS
from pipelines.mgm.parts import ORIGINAL_DIR
from pipelines.mgm.remote_code import add_remote_code
from pipelines.mgm.skeleton import BUILDING, skeleton
from pipelines.mgm.stored import Stored
from pipelines.mgm.tensorfiles import write_index, write_streamed
from pipelines.modelfiles import ADAPTER, CONFIG, beside, model_identity, read_object, tensor_shapes, weight_files
from pipelines.progress import say

__all__ = ["Merger", "compare_files", "merge_module", "run", "with_adapter", "write"]


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
    check_plain_directory(model)
    if is_quantized(model):
        raise UserError(f"{model}: its weights are quantized; merge into the model that it was made from")
    base = model_identity(model)
    if not config.any_base:
        _refuse_other_base(adapter, model, base)
    stage = open_stage(output, "merge", decides(base, identity(adapter), config), restart=restart)
    if stage.complete:
        return stage.manifest
    say(f"merge: {adapter} into {model}")
    quiet()
    try:
        with BUILDING:
            facts = _merge(model, adapter, output, config)
    except Exception:
        shutil.rmtree(output)  # half a model must never look like one
        raise
    if "carried" in facts:
        say("merge: a prefix has no weight to go into; the model's directory carries it")
    else:
        say(
            f"merge: logits agree within {facts['max_logit_difference']:.2g} ({facts['merged_tensors']} tensors merged)"
        )
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
    check_tensors(model)
    update = fit.look(adapter, load_skeleton(model))
    if update.faults:
        raise UserError(f"{adapter} cannot be merged into {model}: {fit.told(update.faults)}")
    if update.config is not None and update.config.is_prompt_learning:
        return _carry(model, adapter, output, config)
    merger = Merger(model, update)
    dtype = stored_dtype(merger.base) if config.dtype == "auto" else getattr(torch, config.dtype)
    inputs = probe.batch(load_processor(model))
    shape = merger.skeleton.config
    expected = streamed.logits(shape, merger.effective, inputs, merger.unmerged())
    difference = _difference(streamed.logits(shape, merger.merged, inputs, {}), expected)
    if not difference <= config.tolerance:
        raise WorkFailed(
            f"the merged logits differ from base + adapter by {difference:.3g} (merge.tolerance {config.tolerance:g}); "
            "nothing written"
        )
    write(merger, output, dtype)
    _write_beside(model, output, dtype, config.remote_code)
    changed = compare_files(merger, output, dtype)
    files = Stored(output, merger.skeleton)
    written = _difference(streamed.logits(shape, files.__getitem__, inputs, {}), expected)
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


def _carry(model: Path, adapter: Path, output: Path, config: MergeConfig) -> dict[str, Any]:
    """The base as it is, and the adapter in a folder of its own."""
    stored = stored_dtype(Stored(model, skeleton(load_config(model), buffers=True)))
    dtype = str(stored).removeprefix("torch.")
    if config.dtype not in ("auto", dtype):
        raise UserError(f"merge.dtype is {config.dtype}: a prefix leaves the base's weights as they are, in {dtype}")
    _write_beside(model, output, stored, config.remote_code)
    for path in (*weight_files(model), *model.glob("*.safetensors.index.json")):
        _link(path, output / path.name)
    (output / ADAPTER).mkdir()
    for name in (PEFT_CONFIG, PEFT_WEIGHTS):
        shutil.copyfile(adapter / name, output / ADAPTER / name)
    return {"carried": "prefix", "dtype": dtype, "lora": False}


def _link(path: Path, to: Path) -> None:
    """The same file under another name, where the file system can: weights take gigabytes."""
    try:
        os.link(path, to)
    except OSError:
        shutil.copyfile(path, to)


def stored_dtype(tensors: Stored) -> torch.dtype:
    """Dtype of a model directory's weights."""
    return next(tensor.dtype for tensor in tensors.tensors.values() if tensor.is_floating_point())


class Merger:
    """The parameters of base + adapter, one at a time.

    Args:
        model: the base's directory.
        update: what the adapter changes there, without faults.
    """

    def __init__(self, model: Path, update: fit.Fit) -> None:
        self.update = update
        self.skeleton = skeleton(load_config(model), buffers=True)
        self.base = Stored(model, self.skeleton)
        self.modules = dict(self.skeleton.named_modules())
        self.last: tuple[str, dict[str, torch.Tensor]] = ("", {})

    def effective(self, name: str) -> torch.Tensor:
        """A parameter with everything that was trained whole, and nothing of PEFT's layers."""
        if name in self.update.whole:
            return self.update.whole[name]
        tensor = self.base[name]
        if name in self.update.rows:
            rows, values = self.update.rows[name]
            tensor = tensor.float().index_copy(0, torch.tensor(rows), values.float())
        return tensor

    def merged(self, name: str) -> torch.Tensor:
        """A parameter of the merged model; float32 if PEFT changed it, else as stored.

        Raises:
            WorkFailed: it is not finite.
        """
        module, _, key = name.rpartition(".")
        if module not in self.update.modules:
            return self.effective(name)
        if self.last[0] != module:  # weight and bias come from one merge
            self.last = (module, merge_module(self.layer(module), module))
        return self.last[1][key]

    def layer(self, module: str) -> Any:
        """PEFT's layer with base weights in float32 and the adapter's beside them, made anew."""
        base = copy.deepcopy(self.modules[module])
        for key, parameter in base._parameters.items():
            if parameter is not None:
                values = self.effective(f"{module}.{key}").float().clone()
                base._parameters[key] = nn.Parameter(values, requires_grad=False)
        return self.update.layer(module, base)

    def unmerged(self) -> dict[str, Any]:
        """Module -> what makes PEFT's layer for it."""
        return {module: partial(self.layer, module) for module in self.update.modules}

    def files(self, dtype: torch.dtype) -> Iterator[tuple[str, Iterator[tuple[str, torch.Tensor]]]]:
        """Each file of the base with its tensors as they have to be written, made as they are asked for."""
        homes = {part: name for name, parts in self.base.parts.items() for part in parts}
        for file, tensors in self.base.files.items():
            yield file, ((name, self._written(name, homes.get(name), dtype)) for name in self._kept(tensors))

    def kinds(self, file: str, dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of the tensors that `files` gives for one of them, in that order."""
        tensors = self.base.files[file]
        kept = {name: tensors[name] for name in self._kept(tensors)}
        return {n: (dtype if t.is_floating_point() else t.dtype, tuple(t.shape)) for n, t in kept.items()}

    def _kept(self, tensors: dict[str, torch.Tensor]) -> list[str]:
        """A tied head follows from the embedding, whatever the base's files say."""
        tied = self.skeleton.config.tie_word_embeddings
        return [name for name in tensors if not (tied and name == HEAD)]

    def _written(self, part: str, name: str | None, dtype: torch.dtype) -> torch.Tensor:
        tensor = self.base.tensors[part]
        if name is not None and self._changes(name):
            tensor = self.base.split(name, self.merged(name))[part]
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    def _changes(self, name: str) -> bool:
        update = self.update
        return name in update.whole or name in update.rows or name.rpartition(".")[0] in update.modules


def merge_module(layer: Any, name: str) -> dict[str, torch.Tensor]:
    """Parameters of the plain module that PEFT's layer becomes, float32, by their names inside of it.

    Raises:
        WorkFailed: PEFT found that they are not finite.
    """
    try:
        layer.merge(safe_merge=True)
    except ValueError as error:
        raise WorkFailed(f"{name} cannot be merged ({error}); nothing written") from error
    return {key: parameter.detach() for key, parameter in layer.get_base_layer().named_parameters()}


def write(merger: Merger, output: Path, dtype: torch.dtype) -> None:
    """The merged model's tensors, in as many files as the base's, and their index."""
    placed: dict[str, str] = {}
    count = len(merger.base.files)
    for number, (file, tensors) in enumerate(merger.files(dtype), start=1):
        own = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        kinds = merger.kinds(file, dtype)
        write_streamed(output / own, kinds, (tensor for _, tensor in tensors))
        placed |= dict.fromkeys(kinds, own)
    if count > 1:
        write_index(output, placed, sum((output / file).stat().st_size for file in set(placed.values())))


def _write_beside(model: Path, output: Path, dtype: torch.dtype, remote_code: bool) -> None:
    """Configuration, tokenizer, processor, template: the base's own files, so that nothing else can differ."""
    for path in beside(model):
        shutil.copyfile(path, output / path.name)
    if (model / ORIGINAL_DIR).is_dir():
        shutil.copytree(model / ORIGINAL_DIR, output / ORIGINAL_DIR)
    config = read_object(output / CONFIG)
    name = str(dtype).removeprefix("torch.")
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if part is config or "dtype" in part:
            part["dtype"] = name
    config.pop("torch_dtype", None)
    (output / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if remote_code or "auto_map" in config:
        add_remote_code(output)


def compare_files(merger: Merger, output: Path, dtype: torch.dtype) -> int:
    """Check every written tensor; returns how many differ from the base model's.

    Raises:
        WorkFailed: names or shapes differ, a file does not hold the merged tensor, or a tower changed that was not
            meant to.
    """
    if bad := differences(merger.skeleton.config, tensor_shapes(output) or {}):
        raise WorkFailed(f"the written files are not the configured model: {bad.told()}")
    after = Stored(output, merger.skeleton).tensors
    changed = 0
    for _, tensors in merger.files(dtype):
        for name, tensor in tensors:
            if not torch.equal(after[name], tensor):
                raise WorkFailed(f"{name} was not written as it was merged")
            before = merger.base.tensors[name]
            same = torch.equal(tensor, before.to(tensor.dtype))
            if not same and name.startswith(TOWERS) and not (merger.update.towers and name in merger.update.whole):
                raise WorkFailed(f"{name} changed, but towers must stay bit-identical to the base model's")
            changed += not same
    return changed


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference; NaN anywhere gives NaN, which no tolerance admits."""
    return float((a - b).abs().max())
