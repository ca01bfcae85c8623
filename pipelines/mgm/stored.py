"""The tensors of a model directory by the names that they have in memory, each read when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from pipelines.mgm.convert_config import in_files
from pipelines.mgm.tensorfiles import read_file
from pipelines.modelfiles import Shapes, weight_files


class Stored(Mapping[str, torch.Tensor]):
    """Maps a parameter's name to its tensor, in the dtype of the files.

    The files are mapped into memory and their pages can be dropped again, so a model of any size costs nothing. A
    tensor that in memory is one and in files many (Mixtral's experts) is put together at every look.

    Args:
        model: of the directory's configuration; only the names and shapes of its parameters count.

    Raises:
        UserError: files are missing or cannot be read.
    """

    def __init__(self, directory: Path, model: nn.Module) -> None:
        self.files = {path.name: read_file(path) for path in weight_files(directory)}
        self.tensors = {name: tensor for tensors in self.files.values() for name, tensor in tensors.items()}
        self.shapes: Shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self.parts = {name: [part for part, _ in in_files(name, shape)] for name, shape in self.shapes.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        parts = self.parts[name]
        if len(parts) == 1:
            return self.tensors[parts[0]]
        return torch.cat([self.tensors[part] for part in parts]).view(self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def split(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """A tensor by the names that it has in files: itself, or its parts (views)."""
        parts = self.parts[name]
        if len(parts) == 1:
            return {parts[0]: tensor}
        rows = [self.tensors[part].shape[0] for part in parts]
        return dict(zip(parts, tensor.flatten(0, 1).split(rows), strict=True))
