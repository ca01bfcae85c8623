"""A pool of rendered scenes for training the sample models, with dense labels read off the scene itself.

Scenes come from the `models` split alone, so nothing that the demo captions, trains on or asks about was ever in the
pool. Every scene is encoded as a JPEG and decoded again, because that is what the models will see.
"""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.images import decode
from pipelines.sample.language import caption
from pipelines.sample.scene import COLORS, COUNTS, GRID, KINDS, LABEL_WORDS, SHAPES, SIGN_WORDS, Scene, Things, jpeg
from pipelines.sample.scene import draw_scenes as draw_scenes

SIDE = 128
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

GLYPHS = ["", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ", *"123456789", "$"]
ITEMS = ["", *KINDS, *SHAPES]
TEXTS = ["", *SIGN_WORDS, *LABEL_WORDS, *"123456789", *("$" + d for d in "123456789")]
ATTRIBUTES = {"glyph": GLYPHS, "item": ITEMS, "color": ["", *COLORS], "text": TEXTS, "count": ["", *COUNTS]}
"""What a place of the picture can be labelled with; class 0 means that there is nothing of the sort."""


@dataclass
class Pool:
    """Rendered scenes.

    Attributes:
        stretched: (N, 3, 128, 128) uint8, resized without regard to the aspect ratio, as BLIP-2 sees a picture.
        padded: (N, 3, 128, 128) uint8, padded to a square with CLIP's mean colour, as MGM sees it.
        scenes: the N scenes.
    """

    stretched: np.ndarray
    padded: np.ndarray
    scenes: list[Scene]

    @property
    def captions(self) -> list[str]:
        """The good caption of every scene."""
        return [caption(scene) for scene in self.scenes]


def load_pool(directory: Path, number: int, seed: int = 1, processes: int = 2) -> Pool:
    """The pool, rendered at the first call and read from `directory` afterwards."""
    scenes = draw_scenes("models", number, seed)
    paths = [directory / f"{name}-{number}-{seed}.npy" for name in ("stretched", "padded")]
    if not all(path.exists() for path in paths):
        directory.mkdir(parents=True, exist_ok=True)
        views = [np.lib.format.open_memmap(path, "w+", np.uint8, (number, 3, SIDE, SIDE)) for path in paths]
        with multiprocessing.Pool(processes) as workers:
            for i, (stretched, padded) in enumerate(workers.imap(_views, scenes, chunksize=64)):
                views[0][i], views[1][i] = stretched, padded
    return Pool(np.load(paths[0], mmap_mode="r"), np.load(paths[1], mmap_mode="r"), scenes)


def _views(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image

    picture = decode(jpeg(scene, seed=0))
    width, height = picture.size
    square = Image.new("RGB", (max(picture.size),) * 2, tuple(int(value * 255) for value in CLIP_MEAN))
    square.paste(picture, ((square.width - width) // 2, (square.height - height) // 2))
    views = [np.asarray(view.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for view in (picture, square)]
    return views[0].transpose(2, 0, 1), views[1].transpose(2, 0, 1)


def labels(scene: Scene, places: int, padded: bool) -> dict[str, np.ndarray]:
    """Class of every attribute at each of `places` x `places` parts of the picture, row by row.

    A part gets an item's labels when its centre, or most of the item, lies there; of two items in one part the nearer
    wins.
    """
    found = {name: np.zeros((places, places), np.int64) for name in ATTRIBUTES}
    width, height = scene.size
    # Cells of the scene are parts of the picture; padding shrinks and shifts the shorter side.
    scale_x, scale_y = (width / max(scene.size), height / max(scene.size)) if padded else (1.0, 1.0)

    def parts(box: tuple[float, float, float, float]) -> tuple[slice, slice]:
        left, right = (((x / GRID - 0.5) * scale_x + 0.5) * places for x in (box[0], box[2]))
        top, bottom = (((y / GRID - 0.5) * scale_y + 0.5) * places for y in (box[1], box[3]))
        return _covered(top, bottom, places), _covered(left, right, places)

    for item in (scene.upper, scene.lower):
        if isinstance(item, Things):
            for box in item.boxes:
                where = parts(box)
                found["item"][where] = ITEMS.index(item.shape)
                found["color"][where] = ATTRIBUTES["color"].index(item.color)
                found["count"][where] = COUNTS.index(item.count) + 1
            continue
        where = parts(item.box)
        found["item"][where] = ITEMS.index(item.kind)
        found["color"][where] = ATTRIBUTES["color"].index(item.color)
        found["text"][where] = TEXTS.index(item.text)
        for offset, character in enumerate(item.text.upper()):
            x = item.column + offset
            found["glyph"][parts((x, item.row, x + 1, item.row + 1))] = GLYPHS.index(character)
    return {name: grid.reshape(-1) for name, grid in found.items()}


def _covered(start: float, end: float, places: int) -> slice:
    """Parts whose centre lies between `start` and `end`; the middle one when the thing is smaller than a part."""
    first, last = int(np.ceil(start - 0.5)), int(np.floor(end - 0.5))
    if last < first:
        first = last = int((start + end) / 2)
    return slice(max(first, 0), min(last, places - 1) + 1)


def label_table(scenes: list[Scene], places: int, padded: bool) -> dict[str, np.ndarray]:
    """`labels` of many scenes: attribute -> (N, places * places) uint8."""
    rows = [labels(scene, places, padded) for scene in scenes]
    return {name: np.stack([row[name] for row in rows]).astype(np.uint8) for name in ATTRIBUTES}
