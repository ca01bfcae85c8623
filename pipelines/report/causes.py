"""Where a gain comes from: what `captune explain` found, as one drawing and a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from pipelines.attribution.causes import CAPTIONS
from pipelines.evaluate.compare import level
from pipelines.evaluate.registry import asked
from pipelines.report import charts, numbers
from pipelines.rundir import Run


@dataclass(frozen=True)
class Explained:
    """One arm's gain.

    Attributes:
        found: `explanation.json`.
        confidence: `95 %`.
        asked: what the scores are of.
        figure: from the baseline's score to the arm's, a bar for each cause; its line is the interval of its part.
        rows: causes that changed something, the largest part first.
        idle: names of the operators that changed no row.
    """

    found: dict[str, Any]
    confidence: str
    asked: str
    figure: Markup
    rows: list[dict[str, Any]]
    idle: list[str]


def explained(run: Run, styles: dict[str, int]) -> list[Explained]:
    """Every arm whose gain was explained; empty where nobody asked for it."""
    return [_explained(found, styles) for found in run.explanations.values()]


def _explained(found: dict[str, Any], styles: dict[str, int]) -> Explained:
    by_part = sorted(found["causes"], key=lambda cause: -abs(cause["part"]))
    live = [cause for cause in by_part if any(cause["changed_rows"].values())]
    confidence = f"{level(found['confidence'])}\N{NARROW NO-BREAK SPACE}%"
    return Explained(
        found,
        confidence,
        asked(found),
        _figure(found, {cause["name"]: cause for cause in live}, styles, confidence),
        [cause | {"name": _name(cause)} for cause in live],
        [_name(cause) for cause in found["causes"] if cause not in live],
    )


def _name(cause: dict[str, Any]) -> str:
    return "new captions" if cause["kind"] == CAPTIONS else str(cause["name"])


def _figure(found: dict[str, Any], live: dict[str, dict[str, Any]], styles: dict[str, int], confidence: str) -> Markup:
    spans = []
    for step in found["waterfall"]:
        at, to, ends = 100 * step["from"], 100 * step["to"], step["interval"]
        if ends is None:
            style = styles.get(step["name"], -1)
            spans.append(charts.Span(step["name"], at, to, numbers.percent_text(step["to"]), style))
        elif cause := live.get(step["name"]):
            low, high = (numbers.points_text(end) for end in ends)
            text = f"{numbers.points_text(cause['part'])}  ({low} to {high})"
            mood = "good" if to >= at else "bad"
            whisker = (at + 100 * ends[0], at + 100 * ends[1])
            spans.append(charts.Span(_name(cause), at, to, text, -1, mood, whisker))
    label = f"From the score of {found['baseline']} to that of {found['arm']} by cause, {confidence} intervals"
    return charts.waterfall(spans, label, lambda value: f"{value:g}")
