"""The report's drawings as inline SVG.

Bars and intervals place things in percent of the width, so that their text keeps its size on a phone; curves have a
view box and scale. Colours, dashes and fonts come from the page's style sheet: class `a0`, `a1`, ... is an arm.
Everything that is drawn can also be read: every chart has a label, every mark a `<title>`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup, escape

Format = Callable[[float], str]
STYLES = 8
"""Arms that the style sheet can tell apart; a ninth looks like the first."""
_MARKERS = (
    "M-5-5H5V5H-5Z",
    "M0-6A6 6 0 1 1 0 6A6 6 0 1 1 0-6Z",
    "M0-7L6.5 5H-6.5Z",
    "M0-7L7 0L0 7L-7 0Z",
    "M0 7L-6.5-5H6.5Z",
    "M-2-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z",
    "M-5 0L5-6.5V6.5Z",
    "M5 0L-5-6.5V6.5Z",
)


def tag(name: str, *children: str | Markup, **attributes: Any) -> Markup:
    """One element; text and attribute values are escaped, `stroke_width` becomes `stroke-width`, `class_` becomes
    `class`.
    """
    pairs = (
        f' {key.rstrip("_").replace("_", "-")}="{escape(_plain(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{''.join(pairs)}>{''.join(str(escape(child)) for child in children)}</{name}>")


def style(index: int) -> str:
    """Class of the arm with this number; below 0 is no arm."""
    return f"a{index % STYLES}" if index >= 0 else "plain"


def marker(index: int, **attributes: Any) -> Markup:
    """The arm's sign, around the origin of its surroundings."""
    return tag("path", d=_MARKERS[index % STYLES], class_=f"mark {style(index)}", **attributes)


def swatch(index: int) -> Markup:
    """The arm's line and sign, for a legend."""
    line = tag("line", x1=0, x2=34, y1=8, y2=8, class_=f"line {style(index)}")
    return tag("svg", line, _at(17, 8, marker(index)), width=34, height=16, class_="swatch", aria_hidden="true")


@dataclass(frozen=True)
class Estimate:
    """A value with its interval, in the chart's unit; `index` is the arm's style."""

    name: str
    low: float
    value: float
    high: float
    text: str
    index: int


@dataclass(frozen=True)
class Span:
    """A bar from one value to another, in the chart's unit. `ends`: the interval of where it ends; `mood` is `good`,
    `bad` or empty for a bar that is an arm's.
    """

    name: str
    start: float
    end: float
    text: str
    index: int
    mood: str = ""
    ends: tuple[float, float] | None = None


def waterfall(rows: Sequence[Span], label: str, tick: Format) -> Markup:
    """From one score to another, step by step: each bar begins where the one above it ends."""
    values = [value for row in rows for value in (row.start, row.end, *(row.ends or ()))]
    step, low, high = axis(min(0.0, *values), max(0.0, *values))

    def x(value: float) -> str:
        return in_percent(2 + 96 * (value - low) / (high - low))

    top, pitch = 4, 46
    bottom = top + pitch * len(rows) + 4
    parts = []
    for value in steps(low, high, step):
        parts.append(tag("line", x1=x(value), x2=x(value), y1=top, y2=bottom, class_="grid"))
        anchor = "start" if value == low else "end" if value + step > high * (1 + 1e-9) else "middle"
        parts.append(tag("text", tick(value), x=x(value), y=bottom + 18, class_="tick", text_anchor=anchor))
    for number, row in enumerate(rows):
        y = top + pitch * number + 24
        left, right = sorted((row.start, row.end))
        width = in_percent(max(96 * (right - left) / (high - low), 0.3))
        marks = [tag("rect", x=x(left), y=y, width=width, height=14, rx=2, class_=f"bar {row.mood}")]
        if row.ends is not None:
            marks.append(tag("line", x1=x(row.ends[0]), x2=x(row.ends[1]), y1=y + 7, y2=y + 7, class_="whisker"))
            marks += [tag("line", x1=x(end), x2=x(end), y1=y + 3, y2=y + 11, class_="whisker") for end in row.ends]
        if number + 1 < len(rows):
            marks.append(tag("line", x1=x(row.end), x2=x(row.end), y1=y + 14, y2=y + pitch, class_="joint"))
        marks.append(tag("text", row.name, x="2%", y=y - 6, class_="name"))
        marks.append(tag("text", row.text, x="98%", y=y - 6, class_="value", text_anchor="end"))
        marks.append(tag("title", f"{row.name}: {row.text}"))
        parts.append(tag("g", *marks, class_=style(row.index)))
    return figure(parts, label, height=bottom + 26)


def intervals(rows: Sequence[Estimate], label: str, tick: Format, *, zero: str = "") -> Markup:
    """Values with their intervals on one axis that includes 0. `zero` marks 0 with a line and these words."""
    step, low, high = axis(min(0.0, *(row.low for row in rows)), max(0.0, *(row.high for row in rows)))

    def x(value: float) -> str:
        return in_percent(2 + 96 * (value - low) / (high - low))

    top, pitch = (22 if zero else 4), 50
    bottom = top + pitch * len(rows) + 4
    parts = []
    for value in steps(low, high, step):
        parts.append(tag("line", x1=x(value), x2=x(value), y1=top, y2=bottom, class_="grid"))
        anchor = "start" if value == low else "end" if value + step > high * (1 + 1e-9) else "middle"
        parts.append(tag("text", tick(value), x=x(value), y=bottom + 18, class_="tick", text_anchor=anchor))
    if zero:
        parts.append(tag("line", x1=x(0), x2=x(0), y1=top - 4, y2=bottom, class_="zero"))
        anchor = "start" if low == 0 else "end" if high == 0 else "middle"
        parts.append(tag("text", zero, x=x(0), y=12, class_="tick", text_anchor=anchor))
    for number, row in enumerate(rows):
        y = top + pitch * number + 34
        marks = [
            tag("line", x1=x(row.low), x2=x(row.high), y1=y, y2=y, class_="range"),
            *(tag("line", x1=x(end), x2=x(end), y1=y - 6, y2=y + 6, class_="range") for end in (row.low, row.high)),
            _at(x(row.value), y, marker(row.index)),
            tag("text", row.name, x="2%", y=y - 16, class_="name"),
            tag("text", row.text, x="98%", y=y - 16, class_="value", text_anchor="end"),
            tag("title", f"{row.name}: {row.text}"),
        ]
        parts.append(tag("g", *marks, class_=style(row.index)))
    return figure(parts, label, height=bottom + 26)


@dataclass(frozen=True)
class Bar:
    """`value` is drawn solid; `lost` continues it, hatched. `note` is small print beside the name."""

    name: str
    value: float
    text: str
    index: int
    lost: float = 0.0
    note: str = ""


def bars(rows: Sequence[Bar], label: str, *, maximum: float | None = None) -> Markup:
    """Horizontal bars from 0, each under its name and value. `maximum` is the value of a full-width bar."""
    whole = maximum or max((row.value + row.lost for row in rows), default=0.0) or 1.0
    pitch, parts = 38, []
    for number, row in enumerate(rows):
        y = pitch * number
        name = [tag("tspan", row.name)] + ([tag("tspan", f"  {row.note}", class_="note")] if row.note else [])
        solid, lost = in_percent(100 * row.value / whole), in_percent(100 * row.lost / whole)
        marks = [
            tag("text", *name, x=0, y=y + 13, class_="name"),
            tag("text", row.text, x="100%", y=y + 13, class_="value", text_anchor="end"),
            tag("rect", x=0, y=y + 19, width="100%", height=10, rx=2, class_="track"),
            tag("rect", x=0, y=y + 19, width=solid, height=10, rx=2, class_="bar"),
        ]
        if row.lost:
            marks.append(tag("rect", x=solid, y=y + 19, width=lost, height=10, class_="lost"))
        parts.append(tag("g", *marks, tag("title", f"{row.name}: {row.text}"), class_=style(row.index)))
    return figure(parts, label, height=pitch * len(rows))


@dataclass(frozen=True)
class Point:
    """One logged step. `x` counts over all phases; `where` says phase and step in words."""

    x: float
    y: float
    where: str


@dataclass(frozen=True)
class Series:
    """A curve; `phases` are drawn one by one, so that no line joins the end of one with the start of the next."""

    name: str
    index: int
    phases: list[list[Point]] = field(default_factory=list)


_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 480, 270, 52, 10, 26, 38
_DRAWN, _HOVERED = 400, 40


def curves(
    series: Sequence[Series],
    spans: Sequence[tuple[str, float, float]],
    label: str,
    number: Format,
    *,
    smooth: bool = True,
) -> Markup:
    """Curves over training steps, every arm on the same axes.

    Args:
        spans: name, first and last x of each phase; they are shaded in turn.
        smooth: draw a moving average over the pale raw values. The y axis is logarithmic when the values span more than
            a factor of 30 without touching 0.
    """
    values = [point.y for line in series for phase in line.phases for point in phase]
    if not values:
        return Markup("")
    log = min(values) > 0 and max(values) / min(values) > 30
    y, y_ticks = _log_scale(values) if log else _linear_scale(values)
    last = max(end for _, _, end in spans)

    def x(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / max(last, 1)

    parts = []
    for place, (name, start, end) in enumerate(spans):
        parts.append(_band(place, name, x(start), x(end)))
    for value in y_ticks:
        parts.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y(value), y2=y(value), class_="grid"))
        parts.append(tag("text", number(value), x=_LEFT - 7, y=y(value) + 4, class_="tick", text_anchor="end"))
    step = _nice(last / 5)
    for value in steps(0, last, step):
        parts.append(
            tag("text", f"{value:,.0f}", x=x(value), y=_HEIGHT - _BOTTOM + 17, class_="tick", text_anchor="middle")
        )
    caption = "optimizer step" + (" (vertical axis logarithmic)" if log else "")
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(tag("text", caption, x=middle, y=_HEIGHT - 4, class_="tick", text_anchor="middle"))
    for line in reversed(series):  # the dashed baseline last: where curves coincide, the other shows through its gaps
        for phase in line.phases:
            if phase:
                parts += _curve(line, phase, x, y, number, smooth)
    return figure(parts, label, viewBox=f"0 0 {_WIDTH} {_HEIGHT}")


def moving_average(values: Sequence[float]) -> list[float]:
    """Exponential moving average over about a twentieth of the values, without the usual bias towards 0 at the
    start.
    """
    keep = 1 - 1 / max(1.0, len(values) / 20)
    total = weight = 0.0
    smoothed = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        smoothed.append(total / weight)
    return smoothed


def _curve(
    line: Series,
    points: list[Point],
    x: Callable[[float], float],
    y: Callable[[float], float],
    number: Format,
    smooth: bool,
) -> Iterable[Markup]:
    raw = [(x(point.x), y(point.y)) for point in points]
    drawn = raw
    if smooth and len(points) > 10:
        yield tag("path", d=_path(_thin(raw)), class_=f"raw {style(line.index)}")
        drawn = [(x(p.x), y(v)) for p, v in zip(points, moving_average([p.y for p in points]), strict=True)]
    yield tag("path", d=_path(_thin(drawn)), class_=f"line {style(line.index)}")
    shown = range(0, len(points), max(1, math.ceil(len(points) / _HOVERED)))
    for i in shown:
        title = tag("title", f"{line.name}, {points[i].where}: {number(points[i].y)}")
        yield tag("g", title, tag("circle", cx=drawn[i][0], cy=drawn[i][1], r=6), class_=f"hover {style(line.index)}")
    # Signs on the line, for eyes and printers that see no colours; each arm's at places of its own.
    for half in (0.1, 0.55):
        share = half + 0.4 * (line.index % STYLES) / STYLES
        yield _at(*drawn[int(share * (len(drawn) - 1))], marker(line.index, transform="scale(.75)"))


def _band(place: int, name: str, left: float, right: float) -> Markup:
    box = tag(
        "rect", x=left, y=_TOP - 20, width=right - left, height=_HEIGHT - _BOTTOM - _TOP + 20, class_=f"band{place % 2}"
    )
    return tag("g", box, tag("text", name, x=left + 6, y=_TOP - 6, class_="phase"))


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about `_DRAWN` points; of every stretch the lowest and the highest stay, so that no spike is hidden."""
    if len(points) <= _DRAWN:
        return points
    size, kept = math.ceil(2 * len(points) / _DRAWN), []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return kept


def _linear_scale(values: Sequence[float]) -> tuple[Callable[[float], float], list[float]]:
    step, low, high = axis(min(0.0, *values), max(0.0, *values))
    return (lambda value: _down((value - low) / (high - low))), steps(low, high, step)


def _log_scale(values: Sequence[float]) -> tuple[Callable[[float], float], list[float]]:
    low, high = math.log10(min(values)), math.log10(max(values))
    low, high = low - 0.03 * (high - low), high + 0.03 * (high - low)
    mantissas = (1,) if high - low > 2.5 else (1, 3)
    ticks = [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in mantissas]
    inside = [tick for tick in ticks if low <= math.log10(tick) <= high]
    return (lambda value: _down((math.log10(value) - low) / (high - low))), inside


def _down(share: float) -> float:
    """Share of the plot's height, from the bottom -> y."""
    return _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * share


def axis(low: float, high: float) -> tuple[float, float, float]:
    """Tick step, and the ends rounded outwards to it."""
    step = _nice((high - low or 1.0) / 5)
    return step, math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step or step


def _nice(step: float) -> float:
    """The next of 1, 2, 5, 10, ... that is not smaller."""
    power = 10.0 ** math.floor(math.log10(step)) if step > 0 else 1.0
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9))


def steps(low: float, high: float, step: float) -> list[float]:
    """Where the ticks are."""
    return [round(low + step * i, 12) for i in range(int((high - low) / step + 1e-6) + 1)]


def _at(x: float | str, y: float, child: Markup) -> Markup:
    """Something drawn around the origin, moved; a nested svg because only it can be placed in percent."""
    return tag("svg", child, x=x, y=y, overflow="visible", width=1, height=1)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def figure(parts: Iterable[Markup], label: str, **attributes: Any) -> Markup:
    """A drawing as wide as its place; `label` says what it shows to those who do not see it."""
    return tag("svg", *parts, role="img", aria_label=label, width="100%", **attributes)


def in_percent(value: float) -> str:
    """A place or length as a share of the drawing's width."""
    return f"{value:.3f}%"


def _plain(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)
