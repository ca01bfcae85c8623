"""The files that make up a Hugging Face model directory, and its identity. No torch: cheap enough for any command."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pipelines.digests import file_digests
from pipelines.errors import UserError

CONFIG = "config.json"
# In the order in which transformers prefers them.
_WHOLE = ["model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
_INDEXES = ["model.safetensors.index.json", "pytorch_model.bin.index.json"]
PROCESSOR = ("processor_config.json", "preprocessor_config.json")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
"""Any of the files in which tokenizers keep their vocabulary."""
_BESIDE = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a `UserError` that names it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object is expected, not {type(value).__name__}")
    return value


def weight_files(directory: Path) -> list[Path]:
    """The tensor files of a model directory, by its index or by the usual names.

    Raises:
        UserError: there are none, or the index names some that are not there.
    """
    for name in _WHOLE[:1] + _INDEXES + _WHOLE[1:]:
        path = directory / name
        if not path.exists():
            continue
        if not name.endswith(".json"):
            return [path]
        files = [directory / shard for shard in sorted(set(read_object(path).get("weight_map", {}).values()))]
        if missing := [file.name for file in files if not file.exists()]:
            raise UserError(f"{path}: names files that are not there: {', '.join(missing)}")
        if files:
            return files
    raise UserError(f"{directory}: no tensor files ({', '.join(_WHOLE + _INDEXES)})")


def model_identity(directory: Path | str) -> str:
    """Digest of what decides the answers of a model: configuration, weights, tokenizer and processor files.

    Not of where the directory lies, nor of what else lies in it (a README, a manifest, another copy of the weights): a
    copied model keeps its identity.

    Returns:
        32 hexadecimal digits.

    Raises:
        UserError: no model directory.
    """
    directory = Path(directory)
    if not (directory / CONFIG).is_file():
        raise UserError(f"{directory}: not a model directory, {CONFIG} is missing")
    names = (CONFIG, *PROCESSOR, *TOKENIZER, *_BESIDE)
    files = [directory / name for name in names if (directory / name).is_file()] + weight_files(directory)
    digests = {file.relative_to(directory).as_posix(): d for file, d in zip(files, file_digests(files), strict=True)}
    return hashlib.blake2b(json.dumps(digests, sort_keys=True).encode(), digest_size=16).hexdigest()
