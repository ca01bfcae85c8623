"""What refining did to the data: funnel, reasons, and the quality of the captions before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from pipelines.manifest import training_text
from pipelines.report import charts, numbers
from pipelines.rundir import Run, Stage

SCREEN = {
    "error": "image missing, broken or unreadable",
    "empty_text": "no text to train on",
    "duplicate": "same image and caption as another row",
}
AFTER = {"mix": "another text of the same sample scores higher", "subset": "not drawn"}
METRICS = (  # key, title, explanation, significant digits
    ("lexical_diversity", "Lexical diversity", "unique words / words; falls as a text grows, see below", 3),
    ("mattr", "Diversity at equal length", "mean of unique words / words over windows of {mattr_window} words", 3),
    ("mean_words", "Words per caption", "mean", 4),
    ("unique_texts", "Distinct captions", "distinct texts / captions", 3),
    ("char_rep_ratio", "Character repetition", "mean share of repeated sequences of {char_rep_len} characters", 2),
    ("word_rep_ratio", "Word repetition", "mean share of repeated sequences of {word_rep_len} words", 2),
)


@dataclass(frozen=True)
class ArmData:
    """An arm's refined data. `funnel` and `reasons` are drawings; all are empty until refining has finished."""

    arm: str
    style: str
    stage: Stage
    metrics: dict[str, Any]
    funnel: Markup
    reasons: Markup

    @property
    def text(self) -> str:
        """The column that trains; empty until refining has finished."""
        return training_text(self.stage.directory) if self.stage.state == "done" else ""


def arms(run: Run, styles: dict[str, int]) -> list[ArmData]:
    """Every arm, refined or not."""
    found = []
    for arm, stage in run.datasets.items():
        metrics = stage.json("metrics.json") if stage.state == "done" else {}
        funnel = _funnel(arm, metrics, stage.inputs.get("process") or [], styles[arm]) if metrics else Markup("")
        reasons = _reasons(arm, metrics, styles[arm]) if metrics.get("reject_reasons") else Markup("")
        found.append(ArmData(arm, charts.style(styles[arm]), stage, metrics, funnel, reasons))
    return found


def metric_rows(found: list[ArmData], styles: dict[str, int]) -> list[dict[str, Any]]:
    """One row per metric: as found, then what each arm trains on, as numbers and as bars."""
    done = [data for data in found if data.metrics]
    if not done:
        return []
    first = done[0].metrics
    rows = []
    for key, title, note, digits in METRICS:
        before = first["before"][key]
        after = [data.metrics["after"][key] for data in done]
        shown = [
            ("as found", before, -1),
            *((d.arm, value, styles[d.arm]) for d, value in zip(done, after, strict=True)),
        ]
        bars = [charts.Bar(name, value or 0.0, _metric_text(value, digits), index) for name, value, index in shown]
        rows.append(
            {
                "title": title,
                "note": note.format_map(first["before"]),
                "digits": digits,
                "before": before,
                "after": after,
                "bars": charts.bars(bars, f"{title}: " + ", ".join(f"{bar.name} {bar.text}" for bar in bars)),
            }
        )
    return rows


def times(before: float | None, after: float | None) -> str:
    """`× 3.4`, where that can be said."""
    return f"× {numbers.figure_text(after / before, 2)}" if before and after is not None else ""


def _metric_text(value: float | None, digits: int) -> str:
    return "too few words" if value is None else numbers.figure_text(value, digits)


def _funnel(arm: str, metrics: dict[str, Any], process: list[dict[str, Any]], index: int) -> Markup:
    steps, total = metrics["funnel"], metrics.get("samples", metrics["rows_in"])
    screen = len(SCREEN)
    notes = [SCREEN.get(step["step"], "") for step in steps[:screen]]
    notes += [_parameters(*next(iter(operator.items()))) for operator in process]
    notes += [AFTER.get(step["step"], "") for step in steps[screen + len(process) :]]
    bars = [
        charts.Bar(
            name=step["step"],
            value=step["rows_out"],
            lost=step["rejected"],
            text=f"{step['rows_out']:,}" + (f" ({numbers.MINUS}{step['rejected']:,})" if step["rejected"] else ""),
            index=index,
            note=note,
        )
        for step, note in zip(steps, notes, strict=True)
    ]
    label = f"Rows left after each step, {arm}: from {total:,} to {metrics['kept']:,}"
    return charts.bars(bars, label, maximum=total)


def _parameters(_: str, parameters: dict[str, Any] | None) -> str:
    return ", ".join(f"{key} {value}" for key, value in (parameters or {}).items())


def _reasons(arm: str, metrics: dict[str, Any], index: int) -> Markup:
    counted = sorted(metrics["reject_reasons"].items(), key=lambda item: -item[1])
    bars = [charts.Bar(reason, number, f"{number:,}", index) for reason, number in counted]
    return charts.bars(bars, f"Rejected rows by reason, {arm}")
