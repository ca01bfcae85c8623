"""The training logs of all models as curves on shared axes, and in a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.report import charts, numbers
from pipelines.rundir import Run, Walk
from pipelines.train.log import read_log

CURVES = (
    ("loss", "Loss", "cross-entropy per token; pale: every logged step, solid: moving average"),
    ("grad_norm", "Gradient norm", "before clipping; pale: every logged step, solid: moving average"),
    ("learning_rate", "Learning rate", "warm-up, then cosine decay, in each phase anew"),
    ("samples_per_second", "Speed", "samples per second; pale: every logged step, solid: moving average"),
)


@dataclass(frozen=True)
class PhaseRow:
    """A line of the table: one phase of one model's training."""

    walk: str
    style: str
    phase: str
    steps: int
    planned: int | None
    batch: int | None
    loss_first: float
    loss_last: float
    norm_median: float
    norm_largest: float
    rate: float
    speed: float
    seconds: float


def curves(run: Run, styles: dict[str, int]) -> list[dict[str, Any]]:
    """One drawing per quantity, all models on the same axes; empty while nothing has been trained."""
    walks = [walk for walk in run.walks if read_log(walk.adapter.directory)]
    if not walks:
        return []
    spans = _spans(walks)
    drawings = []
    for key, title, note in CURVES:
        series = [charts.Series(walk.name, styles[walk.arm], _phases(walk, key, spans)) for walk in walks]
        label = f"{title} over training steps of {', '.join(walk.name for walk in walks)}"
        figure = charts.curves(series, spans, label, numbers.figure_text, smooth=key != "learning_rate")
        drawings.append({"title": title, "note": note, "figure": figure})
    return drawings


def table(run: Run, styles: dict[str, int]) -> list[PhaseRow]:
    """Every phase of every model that has logged something."""
    rows = []
    for walk in run.walks:
        facts = walk.adapter.manifest.get("phases") or {}
        for phase, lines in _by_phase(walk).items():
            rows.append(_row(walk, charts.style(styles[walk.arm]), phase, lines, facts.get(phase) or {}, run.recipe))
    return rows


def _row(
    walk: Walk, style: str, phase: str, lines: list[dict[str, Any]], facts: dict[str, Any], recipe: dict[str, Any]
) -> PhaseRow:
    losses, norms = [line["loss"] for line in lines], sorted(line["grad_norm"] for line in lines)
    tenth = max(1, len(losses) // 10)
    seconds = lines[-1]["seconds"]
    speeds = [line["samples_per_second"] for line in lines]
    return PhaseRow(
        walk=walk.name,
        style=style,
        phase=phase,
        steps=lines[-1]["step"],
        planned=facts.get("steps") or ((recipe.get("train") or {}).get(phase) or {}).get("steps"),
        batch=facts.get("batch"),
        loss_first=_mean(losses[:tenth]),
        loss_last=_mean(losses[-tenth:]),
        norm_median=norms[len(norms) // 2],
        norm_largest=norms[-1],
        rate=max(line["learning_rate"] for line in lines),
        speed=lines[-1]["step"] * facts["batch"] / seconds if facts.get("batch") and seconds else _mean(speeds),
        seconds=seconds,
    )


def _by_phase(walk: Walk) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for line in read_log(walk.adapter.directory):
        found.setdefault(line["phase"], []).append(line)
    return found


def _spans(walks: Sequence[Walk]) -> list[tuple[str, float, float]]:
    """Phases one after the other; each as long as the longest that any model has logged."""
    longest: dict[str, int] = {}
    for walk in walks:
        for line in read_log(walk.adapter.directory):
            longest[line["phase"]] = max(line["step"], longest.get(line["phase"], 0))
    spans, start = [], 0
    for phase, steps in longest.items():
        spans.append((phase, float(start), float(start + steps)))
        start += steps
    return spans


def _phases(walk: Walk, key: str, spans: Sequence[tuple[str, float, float]]) -> list[list[charts.Point]]:
    """Points to draw; a value that is no finite number has no place on an axis (the table says `nan`)."""
    lines = _by_phase(walk)
    return [
        [
            charts.Point(start + line["step"], line[key], f"{name} step {line['step']}")
            for line in lines.get(name, ())
            if math.isfinite(line[key])
        ]
        for name, start, _ in spans
    ]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
