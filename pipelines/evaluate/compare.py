"""Evaluations of the same questions side by side: paired intervals, a paired test, questions won and lost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import UserError
from pipelines.evaluate.config import CompareConfig
from pipelines.evaluate.stage import read_scores
from pipelines.manifest import write_json
from pipelines.rundir import COMPARISON

if TYPE_CHECKING:
    import numpy as np

CORRECT_FROM = 0.5
"""McNemar's test needs right and wrong: an answer counts as right when its soft score is at least this, which takes two
agreeing humans."""
_DRAWS_AT_ONCE = 4_000_000


def run(evaluations: dict[str, Path], output: Path, config: CompareConfig) -> dict[str, Any]:
    """Compare every arm with the baseline, write `output/comparison.json` and return it.

    Args:
        evaluations: arm -> directory of its evaluation; scores in [0, 1].

    Raises:
        UserError: fewer than two arms, no baseline among them, or evaluations that are not of the same questions asked
            the same way.
    """
    if len(evaluations) < 2:
        raise UserError("compare needs at least two evaluations")
    baseline = config.baseline_among(evaluations)
    arms = {name: read_scores(path) for name, path in evaluations.items()}
    _check_same_questions(arms, baseline)
    comparison = compare(arms, config)
    comparison["evaluations"] = {name: str(Path(path)) for name, path in evaluations.items()}
    write_json(Path(output) / COMPARISON, comparison)
    return comparison


def compare(arms: dict[str, dict[str, Any]], config: CompareConfig) -> dict[str, Any]:
    """The comparison of `scores.json` contents. All intervals come from the same resamples of questions, so they are
    paired.
    """
    import numpy as np

    baseline = config.baseline_among(arms)
    ids = [row["question_id"] for row in arms[baseline]["questions"]]
    rows = {name: {row["question_id"]: row for row in arm["questions"]} for name, arm in arms.items()}
    scores_AQ = np.array([[rows[name][key]["score"] for key in ids] for name in arms])
    resampled_AR = bootstrap_means(scores_AQ, config.resamples, config.seed)
    base = list(arms).index(baseline)
    facts = ("benchmark", "count", "conditions", "ocr_tokens", "images")
    result: dict[str, Any] = {
        **{key: arms[baseline].get(key) for key in facts},
        "baseline": baseline,
        "confidence": config.confidence,
        "resamples": config.resamples,
        "seed": config.seed,
        "correct_from": CORRECT_FROM,
        "arms": {},
        "differences": {},
    }
    for index, (name, arm) in enumerate(arms.items()):
        result["arms"][name] = {
            "accuracy": arm["accuracy"],
            "interval": interval(resampled_AR[index], config.confidence),
            **{key: arm.get(key) for key in ("errors", "truncated", "model", "answered_by")},
        }
        if index != base:
            difference = _difference(rows[baseline], rows[name], ids, config)
            difference["interval"] = interval(resampled_AR[index] - resampled_AR[base], config.confidence)
            difference["excludes_zero"] = _excludes_zero(difference, config.confidence)
            result["differences"][name] = difference
    return result


def _excludes_zero(difference: dict[str, Any], confidence: float) -> bool:
    """Whether interval and exact test agree that there is a difference, and failures could not undo it.

    A bootstrap of few questions that all fall one way has no width, and would call a single question proof.
    """
    low, high = difference["interval"]
    test = difference["mcnemar"]
    balance = test["only_this_arm_correct"] - test["only_baseline_correct"]
    agree = (low > 0 and balance > 0) or (high < 0 and balance < 0)
    return agree and test["p_value"] < 1 - confidence and not difference["failures"]["may_turn_the_sign"]


def bootstrap_means(scores_AQ: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Mean score of each arm in each resample of the questions (drawn with replacement, the same questions for all
    arms).

    Args:
        scores_AQ: float [arms, questions].

    Returns:
        float [arms, resamples].
    """
    import numpy as np

    random = np.random.default_rng(seed)
    questions = scores_AQ.shape[1]
    means = [
        scores_AQ[:, random.integers(0, questions, size=(count, questions))].mean(axis=2)
        for count in _chunks(resamples, max(1, _DRAWS_AT_ONCE // (questions * len(scores_AQ))))
    ]
    return np.concatenate(means, axis=1)


def interval(samples: np.ndarray, confidence: float) -> list[float]:
    """Percentile interval [low, high]."""
    import numpy as np

    low, high = np.quantile(samples, [(1 - confidence) / 2, (1 + confidence) / 2])
    return [float(low), float(high)]


def mcnemar(won: int, lost: int) -> float:
    """Exact two-sided p-value of McNemar's test: `won` and `lost` are the questions that exactly one of the two arms
    got right.
    """
    from scipy.stats import binomtest

    return float(binomtest(won, won + lost, 0.5).pvalue) if won + lost else 1.0


def failure_bounds(base: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> list[float]:
    """[Least, largest] difference that the arms could have had if every failed request had been answered: a missing
    answer may have been worth anything from 0 to 1, to either arm.

    Args:
        base: rows of `scores.json`; `other` has the same questions in the same order.
    """
    least = [_worth(new, 0.0) - _worth(old, 1.0) for old, new in zip(base, other, strict=True)]
    largest = [_worth(new, 1.0) - _worth(old, 0.0) for old, new in zip(base, other, strict=True)]
    return [math.fsum(least) / len(least), math.fsum(largest) / len(largest)]


def _worth(row: dict[str, Any], unanswered: float) -> float:
    return unanswered if row["error"] is not None else float(row["score"])


def withheld(comparison: dict[str, Any]) -> list[str]:
    """A sentence for every arm about which failed requests forbid a verdict."""
    baseline = comparison["baseline"]
    return [
        f"{arm} against {baseline}: no verdict, because {found['failures']['count']} failed requests could turn the "
        f"sign of the difference ({_points(found['failures']['bounds'])}); the same command that evaluated asks them "
        "again"
        for arm, found in comparison["differences"].items()
        if found["failures"]["may_turn_the_sign"]
    ]


def sentence(comparison: dict[str, Any], arm: str) -> str:
    """The result for one arm in words."""
    found, baseline = comparison["differences"][arm], comparison["baseline"]
    test = found["mcnemar"]
    text = (
        f"{arm} {100 * comparison['arms'][arm]['accuracy']:.1f} %, "
        f"{baseline} {100 * comparison['arms'][baseline]['accuracy']:.1f} %: "
        f"difference {100 * found['difference']:+.1f} points, {level(comparison['confidence'])} % interval "
        f"{_points(found['interval'])}, McNemar p = {test['p_value']:.2g}"
    )
    if found["failures"]["may_turn_the_sign"]:
        return f"{text}; no verdict, because failed requests could make it {_points(found['failures']['bounds'])}"
    if not found["excludes_zero"]:
        text += "; does not exclude zero"
        if not found["interval"][0] <= 0 <= found["interval"][1]:
            text += f": the exact test sees {test['only_this_arm_correct']} won and "
            text += f"{test['only_baseline_correct']} lost"
    return text


def level(confidence: float) -> str:
    """The confidence in per cent, never rounded to certainty: `95`, `99.9`."""
    return f"{round(100 * confidence, 10):.12g}"


def _points(ends: Sequence[float]) -> str:
    return f"{100 * ends[0]:+.1f} to {100 * ends[1]:+.1f}"


def summarise(comparisons: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several seeds' comparisons: per arm the difference to the baseline in each, its mean and spread, and whether its
    sign is one.

    Raises:
        UserError: no comparisons, or comparisons of different arms.
    """
    if not comparisons:
        raise UserError("no comparisons to summarise")
    names = list(comparisons[0]["differences"])
    for other in comparisons:
        if list(other["differences"]) != names or other["baseline"] != comparisons[0]["baseline"]:
            raise UserError("only comparisons of the same arms with the same baseline can be summarised")
    summary: dict[str, Any] = {"baseline": comparisons[0]["baseline"], "seeds": len(comparisons), "differences": {}}
    for name in names:
        found = [entry["differences"][name] for entry in comparisons]
        differences = [entry["difference"] for entry in found]
        mean = math.fsum(differences) / len(differences)
        spread = math.fsum((value - mean) ** 2 for value in differences) / max(1, len(differences) - 1)
        summary["differences"][name] = {
            "each": differences,
            "mean": mean,
            "standard_deviation": math.sqrt(spread),
            "same_sign": all(value > 0 for value in differences) or all(value < 0 for value in differences),
            "intervals_exclude_zero": sum(entry["excludes_zero"] for entry in found),
            "withheld": sum(entry["failures"]["may_turn_the_sign"] for entry in found),
        }
    return summary


def _difference(
    base: dict[str, Any], other: dict[str, Any], ids: Sequence[str], config: CompareConfig
) -> dict[str, Any]:
    gains = {key: other[key]["score"] - base[key]["score"] for key in ids}
    right = {key: (base[key]["score"] >= CORRECT_FROM, other[key]["score"] >= CORRECT_FROM) for key in ids}
    only_other = sum(pair == (False, True) for pair in right.values())
    only_base = sum(pair == (True, False) for pair in right.values())
    lists = {
        "won": [key for key in ids if gains[key] > 0],
        "lost": [key for key in ids if gains[key] < 0],
        "tied": [key for key in ids if gains[key] == 0],
    }
    rows = [base[key] for key in ids], [other[key] for key in ids]
    failed = sum(row["error"] is not None for arm in rows for row in arm)
    bounds = failure_bounds(*rows)
    return {
        "difference": math.fsum(gains.values()) / len(ids),
        "failures": {
            "count": failed,
            "bounds": bounds,
            "may_turn_the_sign": failed > 0 and bounds[0] <= 0 <= bounds[1],
        },
        "mcnemar": {
            "only_this_arm_correct": only_other,
            "only_baseline_correct": only_base,
            "both_correct": sum(pair == (True, True) for pair in right.values()),
            "neither_correct": sum(pair == (False, False) for pair in right.values()),
            "p_value": mcnemar(only_other, only_base),
        },
        "counts": {kind: len(keys) for kind, keys in lists.items()},
        **lists,
        "examples": {
            kind: [_example(base[key], other[key]) for key in _most_telling(lists[kind], gains, config.examples)]
            for kind in ("won", "lost")
        },
    }


def _most_telling(keys: Sequence[str], gains: dict[str, float], limit: int) -> list[str]:
    """Largest change first; among equals the benchmark's own order."""
    return sorted(keys, key=lambda key: -abs(gains[key]))[:limit]


def _example(base: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return {
        **{key: base[key] for key in ("question_id", "image_id", "question", "answers")},
        "baseline": {key: base[key] for key in ("prediction", "score", "error")},
        "arm": {key: other[key] for key in ("prediction", "score", "error")},
    }


def _check_same_questions(arms: dict[str, dict[str, Any]], baseline: str) -> None:
    """Scores compare only when question, prompt and answer length were the same."""
    first = arms[baseline]
    ids = [row["question_id"] for row in first["questions"]]
    for name, arm in arms.items():
        theirs = [row["question_id"] for row in arm["questions"]]
        if set(theirs) != set(ids) or len(theirs) != len(ids):
            odd = sorted(set(theirs) ^ set(ids))[:5]
            raise UserError(
                f"'{name}' and '{baseline}' did not answer the same questions (for example {', '.join(odd)})"
            )
        for key in ("benchmark", "ocr_tokens", "max_new_tokens"):
            if arm.get(key) != first.get(key):
                raise UserError(
                    f"'{name}' and '{baseline}' were not asked the same way: "
                    f"{key} is {arm.get(key)} and {first.get(key)}"
                )
        if arm["annotations"]["identity"] != first["annotations"]["identity"]:
            raise UserError(f"'{name}' and '{baseline}' were scored with different annotation files")
        if arm.get("prompts") != first.get("prompts"):
            raise UserError(
                f"'{name}' and '{baseline}' were not asked in the same words; evaluate both with one version of captune"
            )


def _chunks(total: int, size: int) -> Iterator[int]:
    for start in range(0, total, size):
        yield min(size, total - start)
