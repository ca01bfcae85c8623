"""Pixels on their way to the device, through memory that the device reads by itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Uploads:
    """Two buffers of pinned memory, filled in turns: one travels while the next is filled. On a CPU, plain memory.

    Args:
        device: where the pixels go.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: list[tuple[Tensor, torch.cuda.Event]] = []

    def stack(self, images: Sequence[np.ndarray]) -> Tensor:
        """uint8 images of one shape -> one tensor (B, 3, H, W) on the device; the copy may still be on its way."""
        if self._device.type != "cuda":
            return torch.from_numpy(np.stack(images))
        buffer, left = self._take(len(images), images[0].shape)
        np.stack(images, out=buffer.numpy()[: len(images)])
        travelling = buffer[: len(images)].to(self._device, non_blocking=True)
        left.record()
        self._buffers.append((buffer, left))
        return travelling

    def _take(self, count: int, shape: tuple[int, ...]) -> tuple[Tensor, torch.cuda.Event]:
        """A buffer that is not on its way any more and is large enough."""
        if len(self._buffers) > 1:
            buffer, left = self._buffers.pop(0)
            left.synchronize()
            if len(buffer) >= count and buffer.shape[1:] == shape:
                return buffer, left
        return torch.empty((count, *shape), dtype=torch.uint8, pin_memory=True), torch.cuda.Event()
