"""Original MGM checkpoints to Hugging Face directories and back.

Conversion renames tensors and never changes one, so the round trip is exact to the bit. It is strict: a tensor that is
neither part of the model nor known to be unused, or a part of the model that no file holds, is an error that names it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from pipelines.errors import UserError
from pipelines.mgm import names
from pipelines.mgm.configuration import MGMConfig
from pipelines.mgm.convert_config import build_config, is_tied, original_config, text_type_of
from pipelines.mgm.parts import (
    ORIGINAL_DIR,
    TOKENIZER_FILES,
    add_tower,
    check_names,
    check_shapes,
    copy_files,
    generation_config,
    listed,
    new_directory,
    rename_tensors,
    write_processor,
)
from pipelines.mgm.tensorfiles import ShardWriter, read_file
from pipelines.modelfiles import read_object, weight_files

_TOWERS = {tower.split(".")[1] for tower in names.TOWERS}


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
    original = read_object(checkpoint / "config.json")
    text_type_of(original, checkpoint / "config.json")
    clip_dir = _tower_directory(clip, original["mm_vision_tower"], checkpoint, "--clip")
    openclip_dir = _tower_directory(openclip, original["mm_vision_tower_aux"], checkpoint, "--openclip")
    new_directory(output)
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
    buffers, tied_head, dtype = rename_tensors(checkpoint, writer, drop_head=is_tied(original, text_type))
    inside = {tower for tower in _TOWERS if any(name.startswith(f"model.{tower}.") for name in writer.shapes)}
    if "vision_tower" not in inside:
        add_tower(writer, clip_dir, names.from_clip, "CLIP", "--clip")
    if "vision_tower_aux" not in inside:
        add_tower(writer, openclip_dir, names.from_openclip, "ConvNeXt", "--openclip")
    writer.close()

    check_names(writer.shapes, checkpoint)
    config = build_config(original, text_type, writer.shapes, clip_dir, dtype)
    config.architectures = ["MGMForConditionalGeneration"]
    config.original_config = original | {"_towers_inside": sorted(inside), "_tied_head_inside": tied_head}
    check_shapes(config, writer.shapes, checkpoint)
    (output / ORIGINAL_DIR).mkdir()
    copy_files(checkpoint, output / ORIGINAL_DIR, TOKENIZER_FILES)
    if buffers:
        save_file(buffers, output / ORIGINAL_DIR / "buffers.safetensors")
    write_processor(config, checkpoint, clip_dir, output)
    config.save_pretrained(output)
    generation_config(config, checkpoint).save_pretrained(output)
    return config


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
    saved = read_object(model_dir / "config.json")
    if saved.get("model_type") != "mgm" or "vision_config_aux" not in saved:
        raise UserError(
            f"{model_dir / 'config.json'}: not a Hugging Face MGM directory (model_type {saved.get('model_type')!r})"
        )
    config = MGMConfig.from_pretrained(model_dir)
    source = config.original_config or {}
    inside = set(source.get("_towers_inside", _TOWERS)) if towers is None else _TOWERS if towers else set()
    new_directory(output)
    try:
        _export(model_dir, output, inside, head=bool(source.get("_tied_head_inside")))
    except BaseException:
        shutil.rmtree(output)
        raise
    text = json.dumps(original_config(config), indent=1, default=str)
    (output / "config.json").write_text(text + "\n", encoding="utf-8")
    kept = model_dir / ORIGINAL_DIR
    copy_files(kept if any((kept / name).exists() for name in TOKENIZER_FILES) else model_dir, output, TOKENIZER_FILES)


def _export(model_dir: Path, output: Path, inside: set[str], head: bool) -> None:
    # The original reads its patch mining weights by way of the index, even when there is one file only.
    writer = ShardWriter(output, always_index=True)
    unknown = []
    for file in weight_files(model_dir):
        for name, tensor in read_file(file).items():
            target = names.to_original(name)
            if target is None:
                unknown.append(name)
            elif not names.is_tower(target) or target.split(".")[1] in inside:
                writer.add(target, tensor)
                if name == names.EMBEDDING and head:
                    writer.add(names.HEAD, tensor)
    if unknown:
        raise UserError(f"{model_dir}: {len(unknown)} tensors that no MGM has: {listed(unknown)}")
    buffers = model_dir / ORIGINAL_DIR / "buffers.safetensors"
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
