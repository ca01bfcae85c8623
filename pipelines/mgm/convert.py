"""Original MGM checkpoints to Hugging Face directories and back.

Conversion renames tensors and never changes one, so the round trip is exact to the bit. It is strict: a tensor that is
neither part of the model nor known to be unused, or a part of the model that no file holds, is an error that names it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, GenerationConfig

from pipelines.errors import UserError
from pipelines.mgm import names
from pipelines.mgm.configuration import MGMConfig
from pipelines.mgm.convert_config import build_config, expected_shapes, is_tied, original_config, text_type_of
from pipelines.mgm.image_processing import MGMImageProcessor
from pipelines.mgm.processing import MGMProcessor
from pipelines.mgm.templates import template_for
from pipelines.mgm.tensorfiles import ShardWriter, find_files, read_file, read_json

_ORIGINAL_DIR = "original"  # inside a converted model: files that the way back needs and nobody else
_EMBEDDING, _HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
_TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
]
_TOWERS = {"vision_tower", "vision_tower_aux"}


def convert_checkpoint(
    checkpoint: str | Path, output: str | Path, clip: str | Path | None = None, openclip: str | Path | None = None
) -> MGMConfig:
    """An original MGM directory -> a directory that `AutoModelForImageTextToText` loads.

    Args:
        checkpoint: with `config.json` and safetensors or `.bin` files, single or sharded. Tokenizer files come along.
        output: created; must be empty if it exists. Nothing is left there when conversion fails.
        clip: the CLIP directory, for the tower's configuration and, when the checkpoint lacks them, its weights.
            Without it, the path in the checkpoint's `mm_vision_tower` is looked for, also next to the checkpoint.
        openclip: the OpenCLIP directory (ConvNeXt weights), likewise.

    Returns:
        The configuration written.

    Raises:
        UserError: another architecture, unreadable files, missing or unaccounted tensors, wrong shapes.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    original = read_json(checkpoint / "config.json")
    text_type_of(original, checkpoint / "config.json")
    clip_dir = _tower_directory(clip, original["mm_vision_tower"], checkpoint, "--clip")
    openclip_dir = _tower_directory(openclip, original["mm_vision_tower_aux"], checkpoint, "--openclip")
    _new_directory(output)
    try:
        return _convert(original, checkpoint, output, clip_dir, openclip_dir)
    except BaseException:
        shutil.rmtree(output)
        raise


def _convert(
    original: dict[str, Any], checkpoint: Path, output: Path, clip_dir: Path | None, openclip_dir: Path | None
) -> MGMConfig:
    text_type = text_type_of(original, checkpoint / "config.json")
    writer = ShardWriter(output)
    buffers, tied_head, dtype = _rename_tensors(checkpoint, writer, drop_head=is_tied(original, text_type))
    inside = {tower for tower in _TOWERS if any(name.startswith(f"model.{tower}.") for name in writer.shapes)}
    if "vision_tower" not in inside:
        _add_tower(writer, clip_dir, names.from_clip, "CLIP", "--clip")
    if "vision_tower_aux" not in inside:
        _add_tower(writer, openclip_dir, names.from_openclip, "ConvNeXt", "--openclip")
    writer.close()

    _check_names(writer.shapes, checkpoint)
    config = build_config(original, text_type, writer.shapes, clip_dir, dtype)
    config.architectures = ["MGMForConditionalGeneration"]
    config.original_config = original | {"_towers_inside": sorted(inside), "_tied_head_inside": tied_head}
    _check_shapes(config, writer.shapes, checkpoint)
    (output / _ORIGINAL_DIR).mkdir()
    _copy(checkpoint, output / _ORIGINAL_DIR, _TOKENIZER_FILES)
    if buffers:
        save_file(buffers, output / _ORIGINAL_DIR / "buffers.safetensors")
    _write_processor(config, checkpoint, clip_dir, output)
    config.save_pretrained(output)
    _generation_config(config, checkpoint).save_pretrained(output)
    return config


def _rename_tensors(
    checkpoint: Path, writer: ShardWriter, drop_head: bool
) -> tuple[dict[str, torch.Tensor], bool, torch.dtype | None]:
    """Every tensor of the checkpoint goes to `writer` or is one of: a buffer, the copy of a tied head."""
    buffers: dict[str, torch.Tensor] = {}
    unknown: list[str] = []
    embedding = head = None
    for file in find_files(checkpoint):
        for name, tensor in read_file(file).items():
            target = names.to_hf(name)
            if names.is_buffer(name):
                buffers[name] = tensor.clone()
            elif target is None:
                unknown.append(name)
            elif target == _HEAD and drop_head:
                head = tensor
            else:
                writer.add(target, tensor)
                embedding = tensor if target == _EMBEDDING else embedding
    if unknown:
        raise UserError(f"{checkpoint}: {len(unknown)} tensors that no MGM has: {_listed(unknown)}")
    if head is not None and (embedding is None or not torch.equal(head, embedding)):
        raise UserError(f"{checkpoint}: lm_head.weight differs from the embeddings that the config says it is tied to")
    return buffers, head is not None, None if embedding is None else embedding.dtype


def _add_tower(
    writer: ShardWriter, directory: Path | None, rename: Callable[[str], str | None], tower: str, option: str
) -> None:
    """Take a tower's tensors from its own directory."""
    if directory is None:
        raise UserError(f"the checkpoint has no {tower} tensors: give that tower's directory as {option}")
    unknown, found = [], 0
    for file in find_files(directory):
        for name, tensor in read_file(file).items():
            target = rename(name)
            if target is None:
                unknown.append(name)
            elif target:
                writer.add(target, tensor)
                found += 1
    if unknown:
        raise UserError(f"{directory}: {len(unknown)} tensors that no {tower} has: {_listed(unknown)}")
    if not found:
        raise UserError(f"{directory}: holds no tensors of a {tower} image tower")


def _check_names(shapes: dict[str, tuple[int, ...]], checkpoint: Path) -> None:
    """Fail early, and by the original's name, when a tensor is missing from which the configuration is read."""
    needed = [
        "model.vision_tower.embeddings.patch_embedding.weight",
        "model.vision_tower.embeddings.position_embedding.weight",
        "model.vision_tower.encoder.layers.0.mlp.fc1.weight",
        "model.vision_tower_aux.embeddings.patch_embeddings.weight",
        "model.vision_tower_aux.encoder.stages.0.layers.0.dwconv.weight",
        _EMBEDDING,
    ]
    if missing := [name for name in needed if name not in shapes]:
        raise UserError(f"{checkpoint}: missing tensors: {_listed(map(_original_name, missing))}")


def _check_shapes(config: MGMConfig, shapes: dict[str, tuple[int, ...]], checkpoint: Path) -> None:
    """The model's tensors, all of them and nothing else, in the shapes that the configuration asks for."""
    expected = expected_shapes(config)
    complaints = []
    if missing := expected.keys() - shapes.keys():
        complaints.append(f"{len(missing)} missing: {_listed(map(_original_name, missing))}")
    if unexpected := shapes.keys() - expected.keys():
        complaints.append(
            f"{len(unexpected)} not part of the configured model: {_listed(map(_original_name, unexpected))}"
        )
    wrong = [
        f"{_original_name(name)} {shapes[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    if wrong:
        complaints.append(f"{len(wrong)} of another shape: {_listed(wrong)}")
    if complaints:
        raise UserError(f"{checkpoint}: tensors and configuration disagree; {'; '.join(complaints)}")


def _write_processor(config: MGMConfig, checkpoint: Path, clip_dir: Path | None, output: Path) -> None:
    """The processor; only its image half when the checkpoint has no tokenizer."""
    pixels: dict[str, Any] = {}
    for directory in (clip_dir, checkpoint):
        if directory is not None and (directory / "preprocessor_config.json").exists():
            saved = read_json(directory / "preprocessor_config.json")
            pixels |= {key: saved[key] for key in ("image_mean", "image_std") if key in saved}
    pixels["do_pad"] = (config.original_config or {}).get("image_aspect_ratio", "pad") == "pad"
    if not any((checkpoint / name).exists() for name in _TOKENIZER_FILES):
        MGMImageProcessor.from_config(config, **pixels).save_pretrained(output)
        return
    # From the copy, which has no config.json: the checkpoint's says "mgm" for a Llama, and means another class by it.
    tokenizer = AutoTokenizer.from_pretrained(output / _ORIGINAL_DIR)
    config.image_token_id = MGMProcessor.add_image_token(tokenizer)
    template = template_for(config.text_config, tokenizer.get_vocab())
    MGMProcessor.from_config(config, tokenizer, template, **pixels).save_pretrained(output)


def _generation_config(config: MGMConfig, checkpoint: Path) -> GenerationConfig:
    if (checkpoint / "generation_config.json").exists():
        return GenerationConfig.from_pretrained(checkpoint)
    return GenerationConfig.from_model_config(config)


def export_original(model_dir: str | Path, output: str | Path, towers: bool | None = None) -> None:
    """A directory of this repository's MGM -> the layout that the original code loads; undoes `convert_checkpoint`.

    Args:
        model_dir: converted, trained or merged; weights as safetensors or `.bin`.
        output: created; must be empty if it exists.
        towers: whether to write the tower tensors into the checkpoint (None: those that were in the one converted, all
            for a model that was never converted).

    Raises:
        UserError: not an MGM directory, unreadable files, unaccounted tensors.
    """
    model_dir, output = Path(model_dir), Path(output)
    saved = read_json(model_dir / "config.json")
    if saved.get("model_type") != "mgm" or "vision_config_aux" not in saved:
        raise UserError(
            f"{model_dir / 'config.json'}: not a Hugging Face MGM directory (model_type {saved.get('model_type')!r})"
        )
    config = MGMConfig.from_pretrained(model_dir)
    source = config.original_config or {}
    inside = set(source.get("_towers_inside", _TOWERS)) if towers is None else _TOWERS if towers else set()
    _new_directory(output)
    try:
        _export(model_dir, output, inside, head=bool(source.get("_tied_head_inside")))
    except BaseException:
        shutil.rmtree(output)
        raise
    text = json.dumps(original_config(config), indent=1, default=str)
    (output / "config.json").write_text(text + "\n", encoding="utf-8")
    kept = model_dir / _ORIGINAL_DIR
    _copy(kept if any((kept / name).exists() for name in _TOKENIZER_FILES) else model_dir, output, _TOKENIZER_FILES)


def _export(model_dir: Path, output: Path, inside: set[str], head: bool) -> None:
    # The original reads its patch mining weights by way of the index, even when there is one file only.
    writer = ShardWriter(output, always_index=True)
    unknown = []
    for file in find_files(model_dir):
        for name, tensor in read_file(file).items():
            target = names.to_original(name)
            if target is None:
                unknown.append(name)
            elif not names.is_tower(target) or target.split(".")[1] in inside:
                writer.add(target, tensor)
                if name == _EMBEDDING and head:
                    writer.add(_HEAD, tensor)
    if unknown:
        raise UserError(f"{model_dir}: {len(unknown)} tensors that no MGM has: {_listed(unknown)}")
    buffers = model_dir / _ORIGINAL_DIR / "buffers.safetensors"
    if buffers.exists():
        for name, tensor in read_file(buffers).items():
            writer.add(name, tensor)
    writer.close()


def _tower_directory(given: str | Path | None, configured: str, checkpoint: Path, option: str) -> Path | None:
    """The tower's directory: as given, or where the checkpoint's configuration points, or next to the checkpoint."""
    if given is not None:
        if not Path(given).is_dir():
            raise UserError(f"{option} {given}: no such directory")
        return Path(given)
    nearby = [checkpoint.resolve(), *list(checkpoint.resolve().parents)[:2]]
    candidates = [Path(configured), *(place / part for place in nearby for part in (configured, Path(configured).name))]
    marks = ("config.json", "open_clip_config.json")
    return next((path for path in candidates if any((path / mark).exists() for mark in marks)), None)


def _new_directory(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: exists and is not an empty directory")
    path.mkdir(parents=True, exist_ok=True)


def _copy(source: Path, target: Path, files: Iterable[str]) -> None:
    for name in files:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def _original_name(name: str) -> str:
    return names.to_original(name) or name


def _listed(items: Iterable[str], limit: int = 200) -> str:
    """Sorted and, when there are very many, cut off with the number left out."""
    items = sorted(items)
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
