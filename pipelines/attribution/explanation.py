"""The explanation of a gain: each cause's part with its interval, the two by two, what leaving out costs, and words.

Shapes: N causes, C coalitions, S seeds, Q questions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.attribution.causes import CAPTIONS, Cause
from pipelines.attribution.plan import Plan
from pipelines.attribution.shapley import Coalition
from pipelines.evaluate import statistics
from pipelines.evaluate.config import CompareConfig
from pipelines.evaluate.registry import asked

if TYPE_CHECKING:
    import numpy as np

Sampled = tuple[float, int]
"""Variance that drawn orders bring, and its degrees of freedom."""


@dataclass(frozen=True)
class Measured:
    """What all coalitions scored.

    Attributes:
        baseline: the arm that none of the causes makes.
        arm: the one that all of them make.
        benchmark: its name.
        drawn: its questions are the sample world's, in the benchmark's form.
        seeds: of training.
        scores: coalition -> float [seeds, questions]; of the causes that change something, numbered as in `causes`.
        pictures: which questions share one.
        sources: coalition -> directories of its evaluations, one for each seed.
        trained: how many models were trained for the explanation.
    """

    baseline: str
    arm: str
    benchmark: str
    drawn: bool
    seeds: list[int]
    scores: dict[Coalition, np.ndarray]
    pictures: statistics.Pictures
    sources: dict[Coalition, list[str]]
    trained: int


def explain(plan: Plan, found: Measured, config: CompareConfig) -> dict[str, Any]:
    """What `explanation.json` holds.

    `arm`, `baseline`, `benchmark`, `drawn`, `questions`, `pictures`, `seeds`, `confidence`
    `method`             `exact`, or `sampled` with `orders`, as many as were drawn (each with its reverse)
    `trained`            models trained for it
    `score`              of `baseline` and `arm`, in [0, 1], mean over seeds
    `gain`               `value`, `interval`
    `causes`             in their order, and of each
        `name`, `kind`   `captions`, `mixing`; `filter`, `mapper` or `global` of an operator
        `changed_rows`   `found` and `new`: rows that it alone drops or changes among the captions as found and the new
        `part`           of the gain; all parts add up to it. Exactly 0 for a cause that changed no row
        `interval`       of the part, over pictures, seeds and drawn orders
        `share`          the part through the gain; null where the gain is 0
        `won`, `lost`    how many questions it won and lost, parts of questions added up
        `left_out`       `value` and `interval` of the arm less the arm without it
        `alone`          the same of it alone less the baseline; null where that was not trained
    `two_by_two`         scores `neither`, `captions` (with mixing), `filters`, `both`, and what captions and filters
                         bring together beyond the sum of each alone: `interaction`, `interval`; null where the arm
                         does not do both
    `waterfall`          from the baseline to the arm: `name`, `from`, `to`, `interval` of the step (null at the ends)
    `coalitions`         every one with a score: `causes`, `score`, `evaluations` (a directory for each seed)
    """
    import numpy as np

    causes, numbers, game = plan.ledger.causes, plan.ledger.live, plan.game
    worth_CSQ = np.stack([found.scores[frozenset(numbers[n] for n in each)] for each in game.coalitions])
    drawn_N = game.drawing_variance(worth_CSQ.mean(axis=(1, 2)))
    parts_SNQ = np.stack([game.parts(worth_CSQ[:, seed]) for seed in range(len(found.seeds))])
    everything = frozenset(numbers)
    base_SQ, arm_SQ = found.scores[frozenset()], found.scores[everything]
    gain = _estimate(arm_SQ - base_SQ, found, config)
    entries = []
    for number, cause in enumerate(causes):
        entry: dict[str, Any] = {"name": cause.name, "kind": cause.kind, "changed_rows": plan.ledger.changed(number)}
        if number in numbers:
            place = numbers.index(number)
            sampled = (float(drawn_N[place]), len(game.weights_GNC) - 1)
            entry |= _part(parts_SNQ[:, place], gain["value"], found, config, sampled)
            entry["left_out"] = _between(found, everything - {number}, everything, config)
            entry["alone"] = _between(found, frozenset(), frozenset([number]), config)
        else:
            nothing = {"value": 0.0, "interval": [0.0, 0.0]}
            entry |= {"part": 0.0, "interval": [0.0, 0.0], "share": 0.0, "won": 0.0, "lost": 0.0}
            entry |= {"left_out": nothing, "alone": nothing}
        entries.append(entry)
    return {
        "arm": found.arm,
        "baseline": found.baseline,
        "benchmark": found.benchmark,
        "drawn": found.drawn,
        "questions": base_SQ.shape[1],
        "pictures": found.pictures.number,
        "seeds": found.seeds,
        "confidence": config.confidence,
        "method": "exact" if game.exact else "sampled",
        **({} if game.exact else {"orders": len(game.weights_GNC)}),
        "trained": found.trained,
        "score": {"baseline": float(base_SQ.mean()), "arm": float(arm_SQ.mean())},
        "gain": gain,
        "causes": entries,
        "two_by_two": _two_by_two(causes, everything, found, config),
        "waterfall": _waterfall(found, entries, float(base_SQ.mean()), float(arm_SQ.mean())),
        "coalitions": [
            {
                "causes": [causes[number].name for number in sorted(each)],
                "score": float(found.scores[each].mean()),
                "evaluations": found.sources[each],
            }
            for each in sorted(found.scores, key=lambda each: (len(each), sorted(each)))
        ],
    }


def _part(
    parts_SQ: np.ndarray, gain: float, found: Measured, config: CompareConfig, sampled: Sampled
) -> dict[str, Any]:
    mean_Q = parts_SQ.mean(axis=0)
    estimate = _estimate(parts_SQ, found, config, sampled)
    return {
        "part": estimate["value"],
        "interval": estimate["interval"],
        "share": estimate["value"] / gain if gain else None,
        "won": float(mean_Q[mean_Q > 0].sum()),
        "lost": float(-mean_Q[mean_Q < 0].sum()),
    }


def _between(found: Measured, before: Coalition, after: Coalition, config: CompareConfig) -> dict[str, Any] | None:
    """What the step from one coalition to another brings; None where one of them has no score."""
    if before not in found.scores or after not in found.scores:
        return None
    return _estimate(found.scores[after] - found.scores[before], found, config)


def _estimate(
    values_SQ: np.ndarray, found: Measured, config: CompareConfig, sampled: Sampled = (0.0, 1)
) -> dict[str, Any]:
    """Mean and interval: over pictures, over seeds where there are several, and over drawn orders."""
    from scipy.stats import t

    mean = math.fsum(values_SQ.mean(axis=0)) / values_SQ.shape[1]
    if not values_SQ.any():
        return {"value": 0.0, "interval": [0.0, 0.0]}
    several, number = len(values_SQ) > 1, found.pictures.number
    if several:
        ends, error, freedom = statistics.over_seeds(values_SQ, found.pictures, config)
    else:
        (samples_R,) = statistics.bootstrap_means(values_SQ, found.pictures, config.resamples, config.seed)
        ends = statistics.interval(samples_R, config.confidence, number)
        error, freedom = statistics.standard_error(samples_R, number), max(number - 1, 1)
    if sampled[0] > 0 and math.isfinite(error):
        together = statistics.satterthwaite([(error**2, freedom), sampled])
        wide = float(t.isf((1 - config.confidence) / 2, together)) * math.sqrt(error**2 + sampled[0])
        ends = [mean - wide, mean + wide]
    return {"value": mean, "interval": ends}


def _two_by_two(
    causes: Sequence[Cause], everything: Coalition, found: Measured, config: CompareConfig
) -> dict[str, Any] | None:
    captions = frozenset(number for number in everything if causes[number].positions == ())
    filters = everything - captions
    if not captions or not filters:
        return None
    cells = {"neither": frozenset[int](), "captions": captions, "filters": filters, "both": everything}
    scores = {name: found.scores[each] for name, each in cells.items()}
    beyond = scores["both"] - scores["captions"] - scores["filters"] + scores["neither"]
    estimate = _estimate(beyond, found, config)
    means = {name: float(each.mean()) for name, each in scores.items()}
    return {**means, "interaction": estimate["value"], "interval": estimate["interval"]}


def _waterfall(found: Measured, entries: list[dict[str, Any]], low: float, high: float) -> list[dict[str, Any]]:
    """Bars side by side: each begins where the one before it ends; the largest part first."""
    steps = [{"name": found.baseline, "from": 0.0, "to": low, "interval": None}]
    at = low
    for entry in sorted(entries, key=lambda entry: -abs(entry["part"])):
        steps.append({"name": entry["name"], "from": at, "to": at + entry["part"], "interval": entry["interval"]})
        at += entry["part"]
    return [*steps, {"name": found.arm, "from": 0.0, "to": high, "interval": None}]


def table(found: dict[str, Any]) -> str:
    """The explanation for a person."""
    gain, seeds = found["gain"], len(found["seeds"])
    drawn = f", {found['orders']} orders drawn" if found["method"] == "sampled" else ""
    on = f"{found['questions']:,} {asked(found)}, {seeds} seed{'s' * (seeds > 1)}{drawn}"
    score = {name: f"{100 * found['score'][name]:.1f} %" for name in ("arm", "baseline")}
    lines = [
        f"{found['arm']} {score['arm']}, {found['baseline']} {score['baseline']}: gain {_points(gain['value'])} points "
        f"({_ends(gain['interval'])}); {on}"
    ]
    heads = ("cause", "part", f"{100 * found['confidence']:g} % interval", "of the gain", "left out", "rows changed")
    rows = [heads]
    for entry in sorted(found["causes"], key=lambda entry: -abs(entry["part"])):
        shown = [_points(entry["part"]), _ends(entry["interval"])] if any(entry["changed_rows"].values()) else ["0", ""]
        share = "" if entry["share"] is None else f"{100 * entry['share']:.0f} %"
        rows.append((entry["name"], *shown, share, _points(0.0 - entry["left_out"]["value"]), _rows(entry)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines += ["  ".join(_cell(row, column, widths) for column in range(len(heads))).rstrip() for row in rows]
    if four := found["two_by_two"]:
        cells = ", ".join(f"{name} {100 * four[name]:.1f} %" for name in ("neither", "captions", "filters", "both"))
        together = f"together {_points(four['interaction'])} ({_ends(four['interval'])}) beyond the sum of each alone"
        lines.append(f"captions and filters: {cells}; {together}")
    if seeds == 1:
        lines.append("one seed: the luck of training is in no interval")
    return "\n".join(lines)


def _cell(row: Sequence[str], column: int, widths: Sequence[int]) -> str:
    return row[column].ljust(widths[column]) if column in (0, len(row) - 1) else row[column].rjust(widths[column])


def _rows(entry: dict[str, Any]) -> str:
    if not any(entry["changed_rows"].values()):
        return "none"
    if entry["kind"] == CAPTIONS:
        return f"{entry['changed_rows']['found']:,}"
    return ", ".join(f"{count:,} of the captions {name}" for name, count in entry["changed_rows"].items())


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def _ends(ends: Sequence[float]) -> str:
    return f"{_points(ends[0])} to {_points(ends[1])}"
