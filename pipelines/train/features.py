"""What the frozen towers say about each image, computed once.

Both towers are frozen in both phases, so an image's tower outputs are the same in every epoch. Kept is everything up to
the first number that learns: CLIP's tokens, and ConvNeXt's positions after the parameter-free half of their LayerNorm
(mining reads them in no other way, and that half costs more than all that learns behind it). Torch only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from pipelines.mgm.modeling import MGMModel
from pipelines.mgm.vision import mine_normalized, normalize_positions
from pipelines.train.data import Loader, prefetch
from pipelines.train.rows import BadRow, Row

if TYPE_CHECKING:
    from pipelines.progress import Progress

Parts = tuple[torch.Tensor, torch.Tensor]
_IMAGES_PER_CALL = 16
_CALL_BYTES = 2 << 30
"""Outputs of one call: on the way there are about five times as many bytes, which a card of 24 GB has room for."""


@torch.no_grad()
def tower_outputs(model: MGMModel, pixel_values: torch.Tensor, pixel_values_aux: torch.Tensor) -> Parts:
    """The frozen part of `MGMModel.get_image_features`, whose arguments these are.

    Returns:
        tokens (N, T, C) of all views, and the normalized positions of their regions (N, T, P, A); the latter in the
        dtype in which matrix products are computed (autocast would round them to it anyway).
    """
    tokens, positions = model.encode_images(pixel_values, pixel_values_aux)
    normalized = normalize_positions(positions, model.uni_key)
    if torch.is_autocast_enabled(normalized.device.type):
        normalized = normalized.to(torch.get_autocast_dtype(normalized.device.type))
    return tokens, normalized


def image_features(model: MGMModel, parts: Parts) -> torch.Tensor:
    """The part of `MGMModel.get_image_features` that learns: mining (folded as in the model) and projector, (N, T,
    D).
    """
    tokens, normalized = parts
    mined = mine_normalized(model.uni_query(tokens), normalized, model.uni_key, model.uni_value)
    return model.multi_modal_projector(tokens + mined)


def blank_outputs(model: MGMModel, device: torch.device) -> Parts:
    """`tower_outputs` of no image: one token that sees one position, all zeros, float32; for batches that show none.

    No weight is looked at on the way: ZeRO-3 would fetch it from the other workers, which do not expect that.
    """
    width, width_aux = model.uni_query.proj.in_features, model.uni_value.proj.in_features
    return torch.zeros((1, 1, width), device=device), torch.zeros((1, 1, 1, width_aux), device=device)


def output_bytes(model: MGMModel, dtype: torch.dtype) -> int:
    """Bytes of one image's `tower_outputs` in `dtype`, from the configuration alone."""
    config = model.config
    side = config.image_size_aux // config.vision_config_aux.patch_size
    positions = (side // (config.image_grid * config.patches_per_side)) ** 2
    numbers = config.vision_config.hidden_size + positions * sum(config.vision_config_aux.hidden_sizes)
    return int(config.num_image_tokens * numbers * dtype.itemsize)


class FeatureCache:
    """Tower outputs by image, in main memory.

    Args:
        images: how many there will be; it grows when substitutes for broken ones make them more.

    Attributes:
        slots: image -> its place.
        bad: image -> why it has none.
    """

    def __init__(self, images: int) -> None:
        self.images = images
        self.slots: dict[Any, int] = {}
        self.bad: dict[Any, str] = {}
        self.parts: list[torch.Tensor] = []

    def reason(self, row: Row) -> str | None:
        """Why the row cannot be used; None where nothing is known against its images."""
        return next((self.bad[image] for image in row.images if image in self.bad), None)

    def gather(self, places: list[int]) -> Parts:
        """Outputs of several images as one batch."""
        index = torch.tensor(places)
        tokens, positions = (part.index_select(0, index) for part in self.parts)
        return tokens, positions

    @property
    def bytes(self) -> int:
        """What is kept."""
        return sum(part.nbytes for part in self.parts)

    def add(self, images: list[Any], parts: Parts) -> None:
        """Keep one batch of outputs."""
        start, end = len(self.slots), len(self.slots) + len(images)
        self.images = max(self.images, end)
        if not self.parts or len(self.parts[0]) < self.images:
            grown = [torch.empty((self.images, *part.shape[1:]), dtype=part.dtype) for part in parts]
            for new, old in zip(grown, self.parts, strict=False):
                new[:start] = old[:start]
            self.parts = grown
        for kept, part in zip(self.parts, parts, strict=True):
            kept[start:end] = part.cpu()
        self.slots.update({image: start + n for n, image in enumerate(images)})


def fill(
    model: MGMModel,
    normalize: Any,
    loader: Loader,
    shown: Callable[[FeatureCache | None], list[Any]],
    limit_bytes: int,
    autocast: Any,
    progress: Callable[[int], Progress] | None = None,
) -> FeatureCache | None:
    """Encode every image that will be shown, and those of the rows that come in the place of broken ones; or return
    None, before anything is computed, when the features would not fit into `limit_bytes`.

    The grouping into calls depends on the images and the model alone, so a restarted worker computes the very same
    bits.

    Args:
        shown: `loader.images` of some steps, or `loader.every_image`.
    """
    parameter = next(model.parameters())
    device = parameter.device
    with autocast():
        cast = torch.is_autocast_enabled(device.type)
        one = output_bytes(model, torch.get_autocast_dtype(device.type) if cast else parameter.dtype)
    images = shown(None)
    if one * len(images) > limit_bytes:
        return None
    cache = FeatureCache(len(images))
    progressing = None if progress is None else progress(len(images))
    while images:  # again for the substitutes of what turned out to be broken, and for theirs
        for keys, pixels in prefetch(_groups(loader, images, cache, _images_per_call(one)), depth=2):
            with autocast():
                cache.add(keys, tower_outputs(model, *normalize(pixels.to(device))))
            if progressing is not None:
                progressing.update(len(keys))
        images = shown(cache)
    found = ((row.name, cache.reason(row)) for row in loader.rows.rows)
    loader.rows.broken.update({name: reason for name, reason in found if reason is not None})
    return cache


def _images_per_call(image_bytes: int) -> int:
    return max(1, min(_IMAGES_PER_CALL, _CALL_BYTES // image_bytes))


def _groups(
    loader: Loader, images: list[Any], cache: FeatureCache, size: int
) -> Iterator[tuple[list[Any], torch.Tensor]]:
    for start in range(0, len(images), size):
        keys, pixels = [], []
        group = images[start : start + size]
        for key, found in zip(group, loader.many_pixels(group), strict=True):
            if isinstance(found, BadRow):
                cache.bad[key] = str(found)
            else:
                keys.append(key)
                pixels.append(found)
        if keys:
            yield keys, torch.stack(pixels)
