"""MGM's preprocessing: one square high-resolution image for ConvNeXt, and what CLIP sees of it.

As the original does it: pad to a square with CLIP's mean colour, bicubic to `image_size_aux`, normalize; the normalized
image, scaled down bilinearly, feeds CLIP (whole, or cut into crops in HD). Needs Pillow and torch, not torchvision.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoImageProcessor
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .configuration import MGMConfig


def to_rgb(image: Any) -> Image.Image:
    """A PIL image, a uint8 array (height, width[, channels]) or tensor (channels, height, width) as an RGB PIL
    image.
    """
    if isinstance(image, torch.Tensor):
        image = image.cpu().numpy()
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise ValueError(f"arrays of pixels must be uint8 (0 to 255), not {image.dtype}")
        if image.ndim == 3 and image.shape[-1] not in (1, 3, 4) and image.shape[0] in (1, 3, 4):
            image = image.transpose(1, 2, 0)
        image = Image.fromarray(image.squeeze(-1) if image.ndim == 3 and image.shape[-1] == 1 else image)
    return image.convert("RGB")


def flatten(images: Any) -> list[Any]:
    """One image, lists of (lists of) images or stacked arrays, as a list of single images in order."""
    if isinstance(images, (list, tuple)):
        return [image for part in images for image in flatten(part)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    return [images]


class MGMImageProcessor(BaseImageProcessor):
    """Images in any form -> `pixel_values` and `pixel_values_aux` as `MGMForConditionalGeneration` wants them.

    Args:
        image_size: side of one CLIP view in pixels.
        image_size_aux: side of the high-resolution image in pixels.
        image_grid: N to cut the image into N x N views of `image_size` (1: one view).
        image_global: add the whole image as last view.
        image_mean, image_std: per channel, of values in 0..1.
        do_pad: pad to a square; if not, scale the short side to `image_size_aux` and crop the centre.
    """

    model_input_names = ["pixel_values", "pixel_values_aux"]

    def __init__(
        self,
        image_size: int = 336,
        image_size_aux: int = 768,
        image_grid: int = 1,
        image_global: bool = False,
        image_mean: Sequence[float] = OPENAI_CLIP_MEAN,
        image_std: Sequence[float] = OPENAI_CLIP_STD,
        do_pad: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.image_size = image_size
        self.image_size_aux = image_size_aux
        self.image_grid = image_grid
        self.image_global = image_global
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.do_pad = do_pad

    @classmethod
    def from_config(cls, config: MGMConfig, **kwargs: Any) -> MGMImageProcessor:
        """The processor that a model of this configuration needs."""
        return cls(
            image_size=config.vision_config.image_size,
            image_size_aux=config.image_size_aux,
            image_grid=config.image_grid,
            image_global=config.image_global,
            **kwargs,
        )

    def square(self, image: Any) -> np.ndarray:
        """One image -> (S, S, 3) uint8 with S = `image_size_aux`."""
        image = to_rgb(image)
        width, height = image.size
        side = self.image_size_aux
        if self.do_pad:
            if width != height:
                longer = max(width, height)
                canvas = Image.new("RGB", (longer, longer), tuple(int(mean * 255) for mean in self.image_mean))
                canvas.paste(image, ((longer - width) // 2, (longer - height) // 2))
                image = canvas
            return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
        shorter = min(width, height)
        scaled = (int(side * width / shorter), int(side * height / shorter))
        left, top = (scaled[0] - side) // 2, (scaled[1] - side) // 2
        image = image.resize(scaled, Image.Resampling.BICUBIC)
        return np.asarray(image.crop((left, top, left + side, top + side)))

    def resize(self, images: Sequence[Any]) -> torch.Tensor:
        """The part for CPU workers: images -> (N, 3, S, S) uint8. `normalize` is the part for the model's device.

        Runs in as many threads as torch does (Pillow works outside of Python's lock).
        """
        pixels = np.empty((len(images), self.image_size_aux, self.image_size_aux, 3), dtype=np.uint8)

        def place(index: int) -> None:
            pixels[index] = self.square(images[index])

        threads = min(torch.get_num_threads(), len(images))
        if threads > 1:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(place, range(len(images))))  # the list raises what a thread raised
        else:
            for index in range(len(images)):
                place(index)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def normalize(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """(N, 3, S, S) uint8 on any device -> `pixel_values`, `pixel_values_aux`, float32 on the same device."""
        mean = torch.tensor(self.image_mean, dtype=torch.float32, device=pixels.device).view(3, 1, 1)
        std = torch.tensor(self.image_std, dtype=torch.float32, device=pixels.device).view(3, 1, 1)
        # In place, and reordered while a value is still one byte: memory traffic is all that this costs.
        aux = pixels.contiguous().to(torch.float32).div_(255).sub_(mean).div_(std)
        return self.views(aux), aux

    def views(self, aux: torch.Tensor) -> torch.Tensor:
        """(N, 3, S, S) -> (N, 3, H, H), or in HD (N, views, 3, H, H) with the crops in reading order, then the
        whole.
        """
        grid, size = self.image_grid, self.image_size
        whole = F.interpolate(aux, size=(size * grid, size * grid), mode="bilinear", align_corners=False)
        if grid == 1:
            return whole
        crops = whole.unflatten(-1, (grid, size)).unflatten(-3, (grid, size)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        if self.image_global:
            small = F.interpolate(whole, size=(size, size), mode="bilinear", align_corners=False)
            crops = torch.cat([crops, small.unsqueeze(1)], dim=1)
        return crops.contiguous()

    def preprocess(
        self,
        images: Any,
        return_tensors: str | None = None,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Images (one, a list, or lists of lists, flattened in order) -> a `BatchFeature` of two tensors.

        `device`: where to normalize and scale down; the images travel there as uint8.
        """
        if kwargs:
            raise ValueError(f"MGMImageProcessor does not know {', '.join(sorted(kwargs))}")
        pixels = self.resize(flatten(self.fetch_images(images)))
        pixel_values, aux = self.normalize(pixels if device is None else pixels.to(device))
        return BatchFeature({"pixel_values": pixel_values, "pixel_values_aux": aux}, tensor_type=return_tensors)


AutoImageProcessor.register(MGMConfig, image_processor_classes={"pil": MGMImageProcessor}, exist_ok=True)

__all__ = ["MGMImageProcessor"]
