"""A Hugging Face model directory: which files make it up, whether they are all there and whole, and its identity.

Nothing here imports torch, and of weights only headers are read: cheap enough to refuse a bad directory before any work
starts.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.digests import file_digests
from pipelines.errors import UserError
from pipelines.manifest import require_finished

Shapes = dict[str, tuple[int, ...]]

CONFIG = "config.json"
# In the order in which transformers prefers them.
_WHOLE = ["model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
_INDEXES = ["model.safetensors.index.json", "pytorch_model.bin.index.json"]
PROCESSOR = ("processor_config.json", "preprocessor_config.json")
ADAPTER = "adapter"
"""A folder in a model directory: PEFT's files of an adapter that no merge can make part of the weights."""
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
        files = [directory / shard for shard in sorted(set(_weight_map(path).values()))]
        if missing := [file.name for file in files if not file.exists()]:
            raise UserError(f"{path}: names files that are not there: {', '.join(missing)}")
        if files:
            return files
    raise UserError(f"{directory}: no weights there ({_WHOLE[0]}, its shards with their index, or {_WHOLE[1]})")


def check_files(directory: Path, model_type: str, parts: Iterable[str]) -> dict[str, Any]:
    """Refuse a directory that is no complete model of this type, as far as that can be told without building one.

    Args:
        parts: what names of tensors begin with, one for each part that the model cannot do without.

    Returns:
        Its configuration.

    Raises:
        UserError: naming what is missing, damaged or of another kind.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such model directory")
    require_finished(directory)
    if not (directory / CONFIG).is_file():
        raise UserError(f"{directory}: not a model directory, {CONFIG} is missing")
    config = read_object(directory / CONFIG)
    if config.get("model_type") != model_type:
        raise UserError(
            f"{directory}: {CONFIG} describes a model of type {config.get('model_type')!r}, not {model_type!r}"
        )
    for kind, names in (("processor", PROCESSOR), ("tokenizer", TOKENIZER)):
        if not any((directory / name).is_file() for name in names):
            raise UserError(f"{directory}: the model has no {kind} ({' or '.join(names[:2])})")
    shapes = tensor_shapes(directory)
    if shapes is not None and (absent := [part for part in parts if not any(n.startswith(part) for n in shapes)]):
        raise UserError(f"{directory}: its weights have nothing named {', '.join(f'{part}*' for part in absent)}")
    return config


def tensor_shapes(directory: Path) -> Shapes | None:
    """Names and shapes of a directory's tensors, from the headers of its files; None of pickled files, which have none.

    Raises:
        UserError: files are missing or cut off, or hold other tensors than the index says.
    """
    files = weight_files(directory)
    if any(file.suffix != ".safetensors" for file in files):
        return None
    found = {file: _header(file) for file in files}
    if files != [directory / _WHOLE[0]]:
        index = directory / _INDEXES[0]
        placed = _weight_map(index).items()
        if lost := sorted(f"{name} in {file}" for name, file in placed if name not in found[directory / file]):
            raise UserError(f"{index}: names {len(lost)} tensors that are not there, e.g. {lost[0]}")
    return {name: shape for shapes in found.values() for name, shape in shapes.items()}


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file, of an index."""
    placed = read_object(index).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
        raise UserError(f"{index}: not the index of a model's files, it has no weight_map")
    return placed


def _header(path: Path) -> Shapes:
    """Names and shapes of a safetensors file: eight bytes of length, that much JSON, then the tensors."""
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, 100_000_000)))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        shapes = {name: tuple(entry["shape"]) for name, entry in tensors.items()}
    except (struct.error, ValueError, AttributeError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    if end != (size := path.stat().st_size):
        raise UserError(f"{path}: not a whole safetensors file, it has {size:,} of {end:,} bytes")
    return shapes


@dataclass(frozen=True)
class Differences:
    """Names of tensors in which a model's files differ from its configuration; false when they agree."""

    missing: list[str]
    unexpected: list[str]
    wrong: list[str]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.wrong)

    def told(self, shown: int = 3) -> str:
        """In words, with so many names of each kind."""
        kinds = {
            "missing": self.missing,
            "not part of the configured model": self.unexpected,
            "of another shape": self.wrong,
        }
        return "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:shown])}{', ...' if len(names) > shown else ''}"
            for kind, names in kinds.items()
            if names
        )


def compare_shapes(expected: Shapes, found: Shapes) -> Differences:
    """Hold the tensors of files (`found`) against those that a configuration asks for."""
    wrong = [
        f"{name} is {found[name]}, the configuration says {shape}"
        for name, shape in sorted(expected.items())
        if name in found and found[name] != shape
    ]
    return Differences(sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys()), wrong)


def load_complete(model_class: Any, directory: Path, **options: Any) -> Any:
    """`model_class.from_pretrained`, where every tensor of the model comes out of the directory's files.

    Transformers gives random numbers to tensors that it does not find, and only reports it; here that is an error.

    Raises:
        UserError: tensors are missing or of another shape, or the files cannot be read.
    """
    from safetensors import SafetensorError

    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # so that they can be named
    try:
        model, info = model_class.from_pretrained(directory, **options)
    except (ValueError, OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{directory}: cannot be loaded ({reason})") from error
    found, expected = ({name: tuple(shapes[i]) for name, *shapes in info["mismatched_keys"]} for i in (0, 1))
    if bad := Differences(sorted(info["missing_keys"]), [], compare_shapes(expected, found).wrong):
        raise UserError(f"{directory}: weights and configuration disagree; {bad.told()}")
    return model


def beside(directory: Path) -> list[Path]:
    """The files that decide a model's answers with its weights: configuration, processor, tokenizer, template."""
    names = (CONFIG, *PROCESSOR, *TOKENIZER, *_BESIDE)
    return [directory / name for name in names if (directory / name).is_file()]


def model_identity(directory: Path | str) -> str:
    """Digest of what decides the answers of a model: configuration, weights, tokenizer and processor files, and the
    adapter that it carries.

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
    carried = directory / ADAPTER
    files = beside(directory) + weight_files(directory) + (sorted(carried.iterdir()) if carried.is_dir() else [])
    digests = {file.relative_to(directory).as_posix(): d for file, d in zip(files, file_digests(files), strict=True)}
    return hashlib.blake2b(json.dumps(digests, sort_keys=True).encode(), digest_size=16).hexdigest()
