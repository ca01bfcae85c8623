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
    if config.baseline not in evaluations:
        raise UserError(f"compare.baseline names '{config.baseline}', but the evaluations are {', '.join(evaluations)}")
    arms = {name: read_scores(path) for name, path in evaluations.items()}
    _check_same_questions(arms, config.baseline)
    comparison = compare(arms, config)
    comparison["evaluations"] = {name: str(Path(path)) for name, path in evaluations.items()}
    write_json(Path(output) / COMPARISON, comparison)
    return comparison


def compare(arms: dict[str, dict[str, Any]], config: CompareConfig) -> dict[str, Any]:
    """The comparison of `scores.json` contents. All intervals come from the same resamples of questions, so they are
    paired.
    """
    import numpy as np

    baseline = arms[config.baseline]
    ids = [row["question_id"] for row in baseline["questions"]]
    rows = {name: {row["question_id"]: row for row in arm["questions"]} for name, arm in arms.items()}
    scores_AQ = np.array([[rows[name][key]["score"] for key in ids] for name in arms])
    resampled_AR = bootstrap_means(scores_AQ, config.resamples, config.seed)
    base = list(arms).index(config.baseline)
    facts = ("benchmark", "count", "ocr_tokens", "images")
    result: dict[str, Any] = {
        **{key: baseline.get(key) for key in facts},
        "baseline": config.baseline,
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
            "errors": arm["errors"],
            "model": arm.get("model"),
        }
        if index != base:
            difference = _difference(rows[config.baseline], rows[name], ids, config)
            difference["interval"] = interval(resampled_AR[index] - resampled_AR[base], config.confidence)
            difference["excludes_zero"] = not difference["interval"][0] <= 0 <= difference["interval"][1]
            result["differences"][name] = difference
    return result


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
    discordant = won + lost
    ways = tail = 1
    for k in range(min(won, lost)):
        ways = ways * (discordant - k) // (k + 1)  # of choosing k + 1 questions
        tail += ways
    return min(1.0, tail * 2 / 2**discordant)  # integers until here: exact for any number of questions


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
    return {
        "difference": math.fsum(gains.values()) / len(ids),
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


def _chunks(total: int, size: int) -> Iterator[int]:
    for start in range(0, total, size):
        yield min(size, total - start)
