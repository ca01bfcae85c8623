"""Drawings of how a number is spread over rows, and of how numbers go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from pipelines.report.charts import Format, axis, figure, in_percent, steps, tag

_HEIGHT, _TOP = 150, 22


@dataclass(frozen=True)
class Line:
    """A bound, drawn across the bars at `value`; `class_` is `bound` or `proposed`."""

    value: float
    text: str
    class_: str


def histogram(
    edges: Sequence[float], counts: Sequence[int], lines: Sequence[Line], label: str, number: Format
) -> Markup:
    """Bars of counts between `edges`, one more than counts, and lines for those bounds that lie among them."""
    step, low, high = axis(edges[0], edges[-1])
    low, high = min(low, edges[0]), max(high, edges[-1])
    most, bottom = max(counts, default=0) or 1, _TOP + _HEIGHT

    def x(value: float) -> float:
        return 1 + 98 * (value - low) / (high - low)

    parts = []
    for left, right, count in zip(edges, edges[1:], counts, strict=False):
        tall = _HEIGHT * count / most
        wide = in_percent(0.94 * (x(right) - x(left)))
        bar = tag("rect", x=in_percent(x(left)), y=bottom - tall, width=wide, height=tall)
        parts.append(tag("g", bar, tag("title", f"{number(left)} to {number(right)}: {count:,} rows"), class_="bin"))
    for value in (each for each in steps(low, high, step) if low <= each <= high):
        words = number(value)
        parts.append(tag("text", words, x=in_percent(x(value)), y=bottom + 18, class_="tick", text_anchor="middle"))
    parts.append(tag("line", x1="1%", x2="99%", y1=bottom, y2=bottom, class_="grid"))
    for line in (each for each in lines if low <= each.value <= high):
        place = in_percent(x(line.value))
        parts.append(
            tag(
                "g",
                tag("line", x1=place, x2=place, y1=_TOP - 8, y2=bottom, class_=line.class_),
                tag("title", line.text),
            )
        )
    return figure(parts, label, height=bottom + 26)
