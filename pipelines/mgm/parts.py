"""The parts of a model directory, from wherever they come: tensors, towers, tokenizer, processor.

Strict: a tensor that is neither part of the model nor known to be unused, or a part of the model that no file holds, is
an error that names it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, GenerationConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from pipelines.errors import UserError
from pipelines.mgm import names
from pipelines.mgm.configuration import MGMConfig
from pipelines.mgm.convert_config import expected_shapes
from pipelines.mgm.image_processing import MGMImageProcessor
from pipelines.mgm.processing import MGMProcessor
from pipelines.mgm.templates import template_for
from pipelines.mgm.tensorfiles import ShardWriter, read_file
from pipelines.modelfiles import compare_shapes, read_object, weight_files

ORIGINAL_DIR = "original"
"""Inside a model directory: files that the way back needs and nobody else."""
TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
]


def new_directory(path: Path) -> None:
    """Make a directory that is empty. Raises `UserError` when it is not."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: exists and is not an empty directory")
    path.mkdir(parents=True, exist_ok=True)


def rename_tensors(
    checkpoint: Path, writer: ShardWriter, drop_head: bool
) -> tuple[dict[str, torch.Tensor], bool, torch.dtype | None]:
    """Every tensor of the checkpoint goes to `writer` or is one of: a buffer, the copy of a tied head."""
    buffers: dict[str, torch.Tensor] = {}
    unknown: list[str] = []
    embedding = head = None
    for file in weight_files(checkpoint):
        for name, tensor in read_file(file).items():
            target = names.to_hf(name)
            if names.is_buffer(name):
                buffers[name] = tensor.clone()
            elif target is None:
                unknown.append(name)
            elif target == names.HEAD and drop_head:
                head = tensor
            else:
                writer.add(target, tensor)
                embedding = tensor if target == names.EMBEDDING else embedding
    if unknown:
        raise UserError(f"{checkpoint}: {len(unknown)} tensors that no MGM has: {listed(unknown)}")
    if head is not None and (embedding is None or not torch.equal(head, embedding)):
        raise UserError(f"{checkpoint}: lm_head.weight differs from the embeddings that the config says it is tied to")
    return buffers, head is not None, None if embedding is None else embedding.dtype


def add_tower(
    writer: ShardWriter, directory: Path | None, rename: Callable[[str], str | None], tower: str, option: str
) -> None:
    """Take a tower's tensors from its own directory."""
    if directory is None:
        raise UserError(f"the checkpoint has no {tower} tensors: give that tower's directory as {option}")
    unknown, found = [], 0
    for file in weight_files(directory):
        for name, tensor in read_file(file).items():
            target = rename(name)
            if target is None:
                unknown.append(name)
            elif target:
                writer.add(target, tensor)
                found += 1
    if unknown:
        raise UserError(f"{directory}: {len(unknown)} tensors that no {tower} has: {listed(unknown)}")
    if not found:
        raise UserError(f"{directory}: holds no tensors of a {tower} image tower")


def check_names(shapes: dict[str, tuple[int, ...]], checkpoint: Path) -> None:
    """Fail early, and by the original's name, when a tensor is missing from which the configuration is read."""
    needed = [
        names.CLIP + "embeddings.patch_embedding.weight",
        names.CLIP + "embeddings.position_embedding.weight",
        names.CLIP + "encoder.layers.0.mlp.fc1.weight",
        names.CONVNEXT + "embeddings.patch_embeddings.weight",
        names.CONVNEXT + "encoder.stages.0.layers.0.dwconv.weight",
        names.EMBEDDING,
    ]
    if missing := [name for name in needed if name not in shapes]:
        raise UserError(f"{checkpoint}: missing tensors: {listed(map(_original_name, missing))}")


def check_shapes(config: MGMConfig, shapes: dict[str, tuple[int, ...]], checkpoint: Path) -> None:
    """The model's tensors, all of them and nothing else, in the shapes that the configuration asks for."""
    theirs, ours = (
        {_original_name(name): shape for name, shape in found.items()} for found in (shapes, expected_shapes(config))
    )
    if bad := compare_shapes(ours, theirs):
        raise UserError(f"{checkpoint}: tensors and configuration disagree; {bad.told(200)}")


def write_processor(config: MGMConfig, checkpoint: Path, clip_dir: Path | None, output: Path) -> None:
    """The processor; only its image half when the checkpoint has no tokenizer."""
    pixels: dict[str, Any] = {}
    for directory in (clip_dir, checkpoint):
        if directory is not None and (directory / "preprocessor_config.json").exists():
            saved = read_object(directory / "preprocessor_config.json")
            pixels |= {key: saved[key] for key in ("image_mean", "image_std") if key in saved}
    pixels["do_pad"] = (config.original_config or {}).get("image_aspect_ratio", "pad") == "pad"
    if not any((checkpoint / name).exists() for name in TOKENIZER_FILES):
        MGMImageProcessor.from_config(config, **pixels).save_pretrained(output)
        return
    # From the copy, which has no config.json: the checkpoint's says "mgm" for a Llama, and means another class by it.
    tokenizer = load_tokenizer(output / ORIGINAL_DIR, config.text_config.model_type, checkpoint)
    config.image_token_id = MGMProcessor.add_image_token(tokenizer)
    template = template_for(config.text_config, tokenizer.get_vocab())
    MGMProcessor.from_config(config, tokenizer, template, **pixels).save_pretrained(output)


def load_tokenizer(directory: Path, text_type: str, whose: Path) -> PreTrainedTokenizerBase:
    """A language model's tokenizer, from any of the files that it may come in.

    Args:
        text_type: the language model's `model_type`, which tells the class where no file does.
        whose: the directory to name when something is wrong.

    Raises:
        UserError: it cannot be read.
    """
    path = directory / "tokenizer_config.json"
    settings = read_object(path) if path.exists() else {}
    kind = settings.get("tokenizer_class")
    options: dict[str, bool] = {}
    if kind is None and (directory / "tokenizer.model").exists():
        kind = "GemmaTokenizer" if text_type == "gemma" else "LlamaTokenizer"
    if str(kind).startswith("Llama"):
        # What silence meant when these were published: the older seams (a space after each special token), and <s> in
        # front. Today it means neither.
        options = {key: True for key in ("legacy", "add_bos_token") if settings.get(key) is None}
    try:
        if path.exists() or (directory / "tokenizer.json").exists():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, **options)
        else:
            tokenizer = getattr(transformers, str(kind)).from_pretrained(directory, **options)
    except Exception as error:  # tokenizers and sentencepiece raise bare exceptions
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{whose}: its tokenizer cannot be read ({reason})") from error
    return tokenizer


def generation_config(config: MGMConfig, checkpoint: Path) -> GenerationConfig:
    """The checkpoint's own, or what its configuration implies."""
    if (checkpoint / "generation_config.json").exists():
        return GenerationConfig.from_pretrained(checkpoint)
    return GenerationConfig.from_model_config(config)


def copy_files(source: Path, target: Path, files: Iterable[str]) -> None:
    """Copy those of the files that are there."""
    for name in files:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def _original_name(name: str) -> str:
    return names.to_original(name) or name


def listed(items: Iterable[str], limit: int = 200) -> str:
    """Sorted and, when there are very many, cut off with the number left out."""
    items = sorted(items)
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
