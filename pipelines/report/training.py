"""The training logs of all models as curves on shared axes, and in a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.report import charts, numbers
from pipelines.rundir import Run, Walk
from pipelines.train.log import read_log
from pipelines.train.stability import Stability, measure

CURVES = (
    ("loss", "Loss", "cross-entropy per token; pale: every logged step, solid: moving average"),
    ("held_out_loss", "Held-out loss", "of the same rows, with the same words, for every model; nobody trains on them"),
    ("grad_norm", "Gradient norm", "before clipping; pale: every logged step, solid: moving average"),
    ("learning_rate", "Learning rate", "the highest of the groups that learn, in each phase anew"),
    ("samples_per_second", "Speed", "samples per second; pale: every logged step, solid: moving average"),
)
_NOT_SMOOTHED = ("learning_rate", "held_out_loss")


@dataclass(frozen=True)
class PhaseRow:
    """A line of the tables: one phase of one model's training.

    Attributes:
        planned, batch: steps and samples a step; None while nobody says so.
        went: what the logged steps say.
        rate: the largest learning rate.
        facts: of the manifest: share that learns, peak memory, tokens a second, and so on; empty until it is written.
    """

    walk: str
    style: str
    phase: str
    steps: int
    planned: int | None
    batch: int | None
    went: Stability
    rate: float
    speed: float
    peak: float | None
    seconds: float
    facts: dict[str, Any]


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
        figure = charts.curves(series, spans, label, numbers.figure_text, smooth=key not in _NOT_SMOOTHED)
        warning = _warning(walks) if key == "loss" else ""
        if figure or key != "held_out_loss":
            drawings.append({"title": title, "note": note, "warning": warning, "figure": figure})
    return drawings


def _warning(walks: Sequence[Walk]) -> str:
    """What must be said where arms that learn different texts share an axis."""
    phases = list(dict.fromkeys(phase for walk in walks for phase in _by_phase(walk)))
    different = [phase for phase in phases if len({_text(walk, phase) for walk in walks}) > 1]
    if not different:
        return ""
    return (
        f"In {' and '.join(different)} the arms learn different texts, and some texts are easier to foretell than "
        "others: the lower curve is not the better model. The held-out loss can be compared."
    )


def _text(walk: Walk, phase: str) -> str:
    """Identity of what a phase learns; where nothing says it, the arm that its captions are from."""
    identities = walk.adapter.inputs.get("data") or {"align": walk.arm}
    return str(identities.get(phase, ""))


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
    seconds = lines[-1]["seconds"]
    speeds = [line["samples_per_second"] for line in lines]
    peaks = [line["peak_memory_gib"] for line in lines if line.get("peak_memory_gib")]
    return PhaseRow(
        walk=walk.name,
        style=style,
        phase=phase,
        steps=lines[-1]["step"],
        planned=facts.get("steps") or ((recipe.get("train") or {}).get(phase) or {}).get("steps"),
        batch=facts.get("batch"),
        went=measure(lines),
        rate=max(line["learning_rate"] for line in lines),
        speed=lines[-1]["step"] * facts["batch"] / seconds if facts.get("batch") and seconds else _mean(speeds),
        peak=max(peaks) if peaks else facts.get("peak_memory_gib"),
        seconds=seconds,
        facts=facts,
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
            if math.isfinite(line.get(key, math.nan))
        ]
        for name, start, _ in spans
    ]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
