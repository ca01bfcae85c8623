"""What can be known about a BLIP-2 directory without loading it: cheap enough to refuse a bad one before any work
starts.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pipelines.blip2.pixels import RESIZES, PixelSpec, spec_from_config
from pipelines.errors import UserError
from pipelines.modelfiles import PROCESSOR, TOKENIZER, check_files, read_object

IMAGE_TOKEN = "<image>"
_HUB_SECONDS = 2.0
_HUB_ID = re.compile(r"[\w-]+(\.[\w-]+)*/[\w.-]+")
_PARTS = ("vision_model.", "query_tokens", "qformer.", "language_projection.", "language_model.")
_CLIP_PARTS = ("vision_model.", "visual_projection.", "text_model.", "text_projection.")


def resolve(model: str, key: str = "caption.model") -> Path:
    """Directory of a model named by a directory or a Hugging Face hub id (downloaded on first use); `key` named it.

    Raises:
        UserError: no such directory, or the hub has no such model or cannot be reached.
    """
    if not model:
        raise UserError(f"{key} is not set: name a model directory or hub id, e.g. Salesforce/blip2-opt-2.7b")
    path = Path(model)
    if path.is_dir():
        return path.absolute()
    if path.exists() or not _HUB_ID.fullmatch(model) or model.startswith("."):
        raise UserError(f"{key}: {model} is not a model directory")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, ignore_patterns=["*.msgpack", "*.h5", "*.onnx"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{key}: {model} is no directory here and could not be had from the hub ({reason})") from None


def locate(model: str, key: str = "caption.model") -> Path | None:
    """As `resolve`, but downloads nothing: None for a model that the hub has and this machine has not yet.

    Raises:
        UserError: as `resolve`.
    """
    if not _HUB_ID.fullmatch(model) or Path(model).exists() or model.startswith("."):
        return resolve(model, key)
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except LocalEntryNotFoundError:
        pass  # not here yet
    try:
        HfApi().model_info(model, timeout=_HUB_SECONDS)
    except Exception as error:  # offline, refused, unknown: the client has a dozen classes for it
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{key}: {model} is no directory here and could not be had from the hub ({reason})") from None
    return None


def check(directory: Path, prompt: str = "", max_new_tokens: int = 1) -> None:
    """Refuse a directory that is no complete BLIP-2 checkpoint.

    Raises:
        UserError: naming what is missing, damaged or of another kind: configuration, weights, processor, tokenizer,
            image token, or room for so many tokens.
    """
    config = check_files(directory, "blip-2", _PARTS)
    pixel_spec(directory)
    _check_image_token(directory, config)
    text = config.get("text_config", {})
    limit = text.get("max_position_embeddings") if text.get("model_type", "opt") == "opt" else None
    # words undercount the prompt's tokens; the engine counts again with the real tokenizer
    needed = config.get("num_query_tokens", 32) + 1 + len(prompt.split()) + max_new_tokens
    if limit is not None and needed > limit:
        raise UserError(
            f"caption.max_new_tokens: {max_new_tokens} new tokens do not fit; {directory} has {limit} "
            f"positions and the image "
            f"and prompt take {needed - max_new_tokens}"
        )


def check_clip(directory: Path) -> None:
    """Refuse a directory that is no complete CLIP. Raises `UserError`, as `check`."""
    check_files(directory, "clip", _CLIP_PARTS)


def pixel_spec(directory: Path, resize: str = RESIZES[0]) -> PixelSpec:
    """The image processor's settings, from `processor_config.json` (transformers 5) or `preprocessor_config.json`
    (older); `resize` says who resizes.
    """
    for name in PROCESSOR:
        if (directory / name).exists():
            config = read_object(directory / name)
            config = config.get("image_processor", config)
            if "size" in config:
                return spec_from_config(config, str(directory / name), resize)
    raise UserError(f"{directory}: no image processor settings ({' or '.join(PROCESSOR)})")


def _check_image_token(directory: Path, config: dict[str, Any]) -> None:
    index = config.get("image_token_index", config.get("image_token_id"))
    if index is None:
        raise UserError(
            f"{directory}: config.json has no image_token_index; use a revision of the checkpoint that has one"
        )
    if not (directory / TOKENIZER[0]).exists():
        return  # an older layout that only transformers can read; the engine checks it after loading
    content = read_object(directory / TOKENIZER[0])
    tokens = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    vocabulary = content.get("model", {}).get("vocab", {})
    found = tokens.get(IMAGE_TOKEN, vocabulary.get(IMAGE_TOKEN) if isinstance(vocabulary, dict) else None)
    refuse_other_image_token(directory, found, index)


def refuse_other_image_token(directory: Path, found: int | None, wanted: int) -> None:
    """The model puts the image where token `wanted` stands; a tokenizer that writes another token there gives captions
    of nothing.
    """
    if found is None:
        raise UserError(
            f"{directory}: its tokenizer lacks the image token '{IMAGE_TOKEN}' (the model expects it at id {wanted})"
        )
    if found != wanted:
        raise UserError(
            f"{directory}: its tokenizer has '{IMAGE_TOKEN}' at id {found}, but the model expects it at id {wanted}"
        )
