"""From a decoded picture to the model's uint8 pixels.

Torch resizes bytes two to three times faster than Pillow (`tests/bench/bench_decode.py`), with the same filters. Fewer
than one byte in a hundred differs, by 1; in pictures so tall that Pillow (13) resizes columns before rows, which torch
never does, up to a fifth of them, by no more in photographs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


RESIZES = ("torch", "pillow")
_OF_TORCH = {2: "bilinear", 3: "bicubic"}
"""Pillow's filter numbers -> torch's names; the other filters only Pillow has."""


@dataclass(frozen=True)
class PixelSpec:
    """What a checkpoint's image processor does, split at the point where pixels are still bytes.

    Attributes:
        height, width: the model's input size.
        resample: Pillow's filter number.
        scale, mean, std: of the normalization that the engine does on its device: `(pixel * scale - mean) / std`.
        resize: who resizes; Pillow gives the very pixels of the image processor.
    """

    height: int
    width: int
    resample: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str = RESIZES[0]

    @property
    def draft_side(self) -> int:
        """Side below which the JPEG decoder must not go: twice the input size leaves the resize real detail to
        average.
        """
        return 2 * max(self.height, self.width)

    @property
    def row_bytes(self) -> int:
        """Bytes of one image in the object store."""
        return 3 * self.height * self.width

    def pixels(self, picture: Image) -> np.ndarray:
        """RGB picture of any size -> uint8 (3, height, width)."""
        import numpy as np
        from PIL.Image import Resampling

        if self.resize == "torch" and self.resample in _OF_TORCH:
            return _resized_by_torch(picture, self.height, self.width, _OF_TORCH[self.resample])
        resized = picture.resize((self.width, self.height), Resampling(self.resample))
        return np.ascontiguousarray(np.asarray(resized, dtype=np.uint8).transpose(2, 0, 1))

    def batch(self, pictures: Sequence[Image]) -> np.ndarray:
        """RGB pictures -> uint8 (B, 3, height, width)."""
        import numpy as np

        if not pictures:
            return np.empty((0, 3, self.height, self.width), np.uint8)
        return np.stack([self.pixels(picture) for picture in pictures])


def _resized_by_torch(picture: Image, height: int, width: int, mode: str) -> np.ndarray:
    import numpy as np
    import torch

    rgb = torch.from_numpy(np.array(picture, dtype=np.uint8))  # (H, W, 3), a copy: torch wants to own what it reads
    resized = torch.nn.functional.interpolate(
        rgb.permute(2, 0, 1)[None], size=(height, width), mode=mode, antialias=True
    )
    return resized[0].contiguous().numpy()


def spec_from_config(config: dict[str, Any], where: str, resize: str = RESIZES[0]) -> PixelSpec:
    """Read an image processor's configuration.

    Args:
        where: it stands.
        resize: one of `RESIZES`.

    Raises:
        UserError: it does something other than resize, rescale and normalize.
    """
    size = config.get("size") or {}
    if isinstance(size, int):
        size = {"height": size, "width": size}
    strange = [key for key in ("do_center_crop", "do_pad") if config.get(key)]
    strange += [key for key in ("do_resize", "do_rescale", "do_normalize") if config.get(key, True) is not True]
    if strange or not {"height", "width"} <= set(size):
        what = f"sets {', '.join(strange)}" if strange else "has no size with height and width"
        raise UserError(f"{where}: the image processor {what}; captune knows BLIP's (resize, rescale, normalize)")
    return PixelSpec(
        height=int(size["height"]),
        width=int(size["width"]),
        resample=int(config.get("resample", 3)),
        scale=float(config.get("rescale_factor", 1 / 255)),
        mean=tuple(config.get("image_mean", (0.48145466, 0.4578275, 0.40821073))),
        std=tuple(config.get("image_std", (0.26862954, 0.26130258, 0.27577711))),
        resize=resize,
    )
