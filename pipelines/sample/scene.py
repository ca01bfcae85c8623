"""Scenes in which text matters: a sign, label, price tag or jersey among shapes, colours, counts and positions.

The picture is a grid of 8 x 8 cells, whatever its size and aspect ratio, and every written character stands in one
cell. That is what makes the world learnable by models of two million parameters: once the picture is resized to the
square that a ViT sees, a character falls into one patch.
"""

from __future__ import annotations

import hashlib
import io
import random
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

GRID = 8
SIGN_WORDS = [
    "open",
    "closed",
    "cafe",
    "stop",
    "exit",
    "sale",
    "bank",
    "hotel",
    "taxi",
    "park",
    "pizza",
    "books",
    "music",
    "toys",
    "shoes",
    "fish",
    "bus",
    "north",
    "south",
    "bikes",
]
LABEL_WORDS = [
    "milk",
    "tea",
    "bread",
    "salt",
    "honey",
    "rice",
    "soap",
    "jam",
    "coffee",
    "sugar",
    "juice",
    "corn",
    "lime",
    "plum",
    "oil",
    "soup",
    "cake",
    "beans",
    "mint",
    "nuts",
]
DIGITS = list("123456789")
COLORS = {
    "red": (205, 40, 40),
    "green": (40, 150, 60),
    "blue": (45, 80, 200),
    "yellow": (240, 210, 50),
    "orange": (240, 135, 30),
    "purple": (135, 60, 165),
    "white": (250, 250, 250),
    "black": (30, 30, 32),
}
_INK = {"yellow": (25, 25, 25), "white": (20, 20, 20), "orange": (25, 20, 15)}
"""Writing on light boards is dark; on all others it is white."""
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
KINDS = ("sign", "label", "price tag", "jersey")
COUNTS = ("one", "two", "three", "four")
SIZES = ((224, 224), (256, 256), (256, 208), (208, 256), (280, 224), (224, 280), (256, 192), (192, 256))
"""Width and height in pixels: 1:1, 5:4 and 4:3, both ways."""


@dataclass(frozen=True)
class Writing:
    """A thing with text on it. `row` and `column` are the cell of its first character."""

    kind: str
    text: str
    color: str
    row: int
    column: int

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of the whole thing, in cells."""
        left, top, right, bottom = (
            self.column - 0.35,
            self.row - 0.35,
            self.column + len(self.text) + 0.35,
            self.row + 1.35,
        )
        if self.kind == "jersey":
            return self.column - 1.1, self.row - 1.0, self.column + 2.1, self.row + 1.9
        if self.kind == "price tag":
            return left - 0.6, top, right, bottom
        if self.kind == "label":
            return left - 0.25, top - 0.5, right + 0.25, bottom + 0.3
        return left, top, right, bottom + 0.55


@dataclass(frozen=True)
class Things:
    """One to four equal shapes in a row. `row` and `columns` are the cells of their centres (in cells)."""

    shape: str
    color: str
    row: float
    columns: tuple[float, ...]

    @property
    def count(self) -> str:
        """How many, in words."""
        return COUNTS[len(self.columns) - 1]

    @property
    def boxes(self) -> list[tuple[float, float, float, float]]:
        """Left, top, right, bottom of each shape, in cells."""
        return [(c - 0.75, self.row - 0.75, c + 0.75, self.row + 0.75) for c in self.columns]


@dataclass(frozen=True)
class Scene:
    """What is in the upper and in the lower half of a picture; at least one of them carries writing."""

    upper: Writing | Things
    lower: Writing | Things
    size: tuple[int, int]
    background: tuple[tuple[int, int, int], tuple[int, int, int]]
    noise: int

    @property
    def writings(self) -> list[Writing]:
        """The one or two things with text on them, upper half first."""
        return [item for item in (self.upper, self.lower) if isinstance(item, Writing)]

    @property
    def things(self) -> Things | None:
        """The row of shapes, when there is one."""
        return next((item for item in (self.upper, self.lower) if isinstance(item, Things)), None)

    @property
    def key(self) -> str:
        """What the scene shows, without where exactly and on which background: two scenes of one key are the same
        scene.
        """
        return " / ".join(_meaning(item) for item in (self.upper, self.lower))


def _meaning(item: Writing | Things) -> str:
    if isinstance(item, Writing):
        return f"{item.color} {item.kind} {item.text}"
    return f"{item.count} {item.color} {item.shape}"


SPLITS = {"models": range(0, 70), "pairs": range(70, 80), "instruct": range(80, 90), "validation": range(90, 100)}
"""Shares of all scenes, by a hash of what they show: no scene is in two splits."""


def draw_scenes(split: str, number: int, seed: int) -> list[Scene]:
    """`number` different scenes of a split, in an order that depends on the seed alone."""
    rng = random.Random(f"{split}/{seed}")
    scenes: dict[str, Scene] = {}
    while len(scenes) < number:
        scene = another_scene(split, rng)
        scenes.setdefault(scene.key, scene)
    return list(scenes.values())


def another_scene(split: str, rng: random.Random) -> Scene:
    """Any scene of a split."""
    while _bucket((scene := _random_scene(rng)).key) not in SPLITS[split]:
        pass
    return scene


def _bucket(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "big") % 100


def _random_scene(rng: random.Random) -> Scene:
    kinds = rng.sample(KINDS, 2)
    first = _random_writing(rng, kinds[0], upper := rng.random() < 0.5)
    second = _random_writing(rng, kinds[1], not upper) if rng.random() < 0.3 else _random_things(rng, not upper)
    pale = tuple(rng.randint(150, 215) for _ in range(3))
    other = tuple(max(110, min(235, value + rng.randint(-35, 35))) for value in pale)
    return Scene(
        upper=first if upper else second,
        lower=second if upper else first,
        size=rng.choice(SIZES),
        background=(pale, other),  # type: ignore[arg-type]
        noise=rng.randint(0, 10),
    )


def _random_writing(rng: random.Random, kind: str, upper: bool) -> Writing:
    text = {
        "sign": lambda: rng.choice(SIGN_WORDS),
        "label": lambda: rng.choice(LABEL_WORDS),
        "price tag": lambda: "$" + rng.choice(DIGITS),
        "jersey": lambda: rng.choice(DIGITS),
    }[kind]()
    margin = 1 if kind in ("jersey", "price tag") else 0
    row = rng.choice((1, 2)) + (0 if upper else 4)
    return Writing(kind, text, rng.choice(list(COLORS)), row, rng.randint(margin, GRID - len(text) - margin))


def _random_things(rng: random.Random, upper: bool) -> Things:
    count = rng.randint(1, 4)
    step = rng.uniform(1.65, 1.95)
    start = rng.uniform(0.9, GRID - 0.9 - step * (count - 1))
    row = rng.uniform(1.2, 2.8) + (0 if upper else 4)
    columns = tuple(round(start + step * i, 2) for i in range(count))
    return Things(rng.choice(SHAPES), rng.choice(list(COLORS)), round(row, 2), columns)


def jpeg(scene: Scene, seed: int) -> bytes:
    """The scene as an encoded JPEG; quality 80 to 95."""
    rng = random.Random(f"{scene.key}/{seed}")
    stream = io.BytesIO()
    render(scene, rng).save(stream, "JPEG", quality=rng.randint(80, 95))
    return stream.getvalue()


def render(scene: Scene, rng: random.Random) -> Image:
    """Draw a scene: background with a gradient and grain, then both halves."""
    from PIL import Image, ImageDraw

    width, height = scene.size
    start, end = scene.background
    ramp = Image.linear_gradient("L").resize((width, height))
    picture = Image.composite(Image.new("RGB", scene.size, end), Image.new("RGB", scene.size, start), ramp)
    draw = ImageDraw.Draw(picture)
    for item in (scene.upper, scene.lower):
        if isinstance(item, Things):
            _draw_things(draw, item, scene.size)
        else:
            _draw_writing(draw, item, scene.size, rng)
    if scene.noise:
        # Seeded grain: a small random tile, stretched and blended in.
        tile = Image.frombytes("L", (64, 64), rng.randbytes(64 * 64)).resize(scene.size)
        picture = Image.blend(picture, tile.convert("RGB"), scene.noise / 255)
    return picture


def _draw_writing(draw: ImageDraw, item: Writing, size: tuple[int, int], rng: random.Random) -> None:
    cell_w, cell_h = size[0] / GRID, size[1] / GRID

    def box(left: float, top: float, right: float, bottom: float) -> tuple[float, float, float, float]:
        return left * cell_w, top * cell_h, right * cell_w, bottom * cell_h

    color, ink = COLORS[item.color], _INK.get(item.color, (250, 250, 250))
    left, top, right, bottom = item.column - 0.35, item.row - 0.3, item.column + len(item.text) + 0.35, item.row + 1.3
    edge = tuple(int(value * 0.6) for value in color)
    if item.kind == "sign":
        middle = (left + right) / 2
        draw.rectangle(box(middle - 0.12, bottom, middle + 0.12, bottom + 0.55), fill=(95, 85, 75))
        draw.rectangle(box(left, top, right, bottom), fill=color, outline=edge, width=2)
    elif item.kind == "label":
        draw.rounded_rectangle(box(left - 0.25, top - 0.5, right + 0.25, bottom + 0.3), radius=9, fill=(150, 165, 175))
        draw.rectangle(box(left + 0.3, top - 0.62, right - 0.3, top - 0.4), fill=(110, 115, 120))
        draw.rectangle(box(left, top, right, bottom), fill=color)
    elif item.kind == "price tag":
        middle = (top + bottom) / 2
        corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left - 0.6, middle)]
        draw.polygon([(x * cell_w, y * cell_h) for x, y in corners], fill=color, outline=edge)
        draw.ellipse(box(left - 0.3, middle - 0.12, left - 0.06, middle + 0.12), fill=(235, 235, 235))
    else:
        shirt = [(-0.6, -0.9), (0.2, -1.0), (0.5, -0.7), (0.8, -1.0), (1.6, -0.9), (2.1, 0.1), (1.5, 0.45)]
        shirt += [(1.45, 1.9), (-0.45, 1.9), (-0.5, 0.45), (-1.1, 0.1)]
        points = [((item.column + dx) * cell_w, (item.row + dy) * cell_h) for dx, dy in shirt]
        draw.polygon(points, fill=color, outline=edge)
    font = _font(int(min(cell_w * 1.15, cell_h * 1.1)))
    for offset, character in enumerate(item.text.upper()):
        x = (item.column + offset + 0.5) * cell_w + rng.uniform(-0.04, 0.04) * cell_w
        y = (item.row + 0.5) * cell_h + rng.uniform(-0.04, 0.04) * cell_h
        draw.text((x, y), character, fill=ink, font=font, anchor="mm", stroke_width=1, stroke_fill=ink)


def _draw_things(draw: ImageDraw, item: Things, size: tuple[int, int]) -> None:
    cell_w, cell_h = size[0] / GRID, size[1] / GRID
    color = COLORS[item.color]
    edge = tuple(int(value * 0.55) for value in color)
    radius = 0.72 * min(cell_w, cell_h)
    outlines: dict[str, list[tuple[float, float]]] = {
        "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
        "triangle": [(0, -1), (1, 0.9), (-1, 0.9)],
        "diamond": [(0, -1.1), (0.8, 0), (0, 1.1), (-0.8, 0)],
        "star": [(0, -1.1), (0.27, -0.35), (1.05, -0.32), (0.43, 0.16), (0.65, 0.92), (0, 0.48)]
        + [(-0.65, 0.92), (-0.43, 0.16), (-1.05, -0.32), (-0.27, -0.35)],
        "cross": [(-0.33, -1), (0.33, -1), (0.33, -0.33), (1, -0.33), (1, 0.33), (0.33, 0.33)]
        + [(0.33, 1), (-0.33, 1), (-0.33, 0.33), (-1, 0.33), (-1, -0.33), (-0.33, -0.33)],
    }
    for column in item.columns:
        x, y = column * cell_w, item.row * cell_h
        if item.shape == "circle":
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color, outline=edge, width=2)
        else:
            points = [(x + dx * radius, y + dy * radius) for dx, dy in outlines[item.shape]]
            draw.polygon(points, fill=color, outline=edge)


@lru_cache(maxsize=64)
def _font(pixels: int) -> FreeTypeFont:
    """Pillow's own embedded font, so that every machine draws the same letters."""
    from PIL import ImageFont

    font = ImageFont.load_default(pixels)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow without FreeType cannot scale its font"
    return font
