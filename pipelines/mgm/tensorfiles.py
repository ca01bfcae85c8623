"""Reading and writing the tensor files of a model directory, one file in memory at a time."""

from __future__ import annotations

import json
import math
import pickle
import struct
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipelines.errors import UserError


def read_file(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file or of a pickled state dict (read with `weights_only=True`)."""
    if path.suffix == ".safetensors":
        return dict(_iterate_safetensors(path))
    try:
        # Only zip archives can be mapped; the format before torch 1.6 is read whole.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a readable state dict ({str(error).splitlines()[0]})") from None
    if not isinstance(state, dict) or not state:
        raise UserError(f"{path}: a pickled {type(state).__name__}, not a state dict")
    if wrong := [str(name) for name, value in state.items() if not isinstance(value, torch.Tensor)]:
        raise UserError(f"{path}: not a state dict, these entries are not tensors: {', '.join(wrong[:5])}")
    return state


def _iterate_safetensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file, truncated perhaps ({error})") from None


_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_streamed(
    path: Path, kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]], tensors: Iterable[torch.Tensor]
) -> None:
    """Write a safetensors file with one tensor in memory at a time.

    Args:
        kinds: name -> dtype and shape, of what `tensors` gives, in its order.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in kinds.items():
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that tensors lie aligned
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for (name, kind), tensor in zip(kinds.items(), tensors, strict=True):
            assert (tensor.dtype, tuple(tensor.shape)) == kind, f"{name} is not {kind}"
            stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]


class ShardWriter:
    """Writes tensors to `model-NNNNN-of-NNNNN.safetensors` and their index, a shard at a time.

    Args:
        directory: exists already.
        max_bytes: size of a shard; a larger single tensor gets a shard of its own.
        always_index: write an index for a single file too (the original's loader needs one).
        dtype: cast floating-point tensors to it; None leaves every tensor as it comes.
    """

    def __init__(
        self,
        directory: Path,
        max_bytes: int = 5_000_000_000,
        always_index: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.directory, self.dtype = directory, dtype
        self.max_bytes = max_bytes
        self.always_index = always_index
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = self._total_bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor; it may be written now or later."""
        if self.dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(self.dtype)
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += size
        self._total_bytes += size
        self.shapes[name] = tuple(tensor.shape)

    def _flush(self) -> None:
        path = self.directory / f"model-{len(self._shards) + 1:05d}.safetensors"
        # Tensors that share memory (a mapped .bin, tied weights) must be apart in a safetensors file.
        owned = {name: tensor.clone() for name, tensor in self._pending.items()}
        save_file(owned, path, metadata={"format": "pt"})
        self._shards.append((path, list(self._pending)))
        self._pending, self._pending_bytes = {}, 0

    def close(self) -> None:
        """Write what is pending and the index."""
        if self._pending:
            self._flush()
        total = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, (path, tensors) in enumerate(self._shards, start=1):
            name = "model.safetensors" if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"
            path.rename(self.directory / name)
            weight_map |= dict.fromkeys(tensors, name)
        if total > 1 or self.always_index:
            write_index(self.directory, weight_map, self._total_bytes)


def write_index(directory: Path, weight_map: dict[str, str], total_bytes: int) -> None:
    """Tensor -> file, for a directory whose tensors lie in several."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
