"""Evaluations of the same questions side by side: paired intervals, a paired test, questions won and lost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.evaluate import statistics
from pipelines.evaluate.config import CompareConfig
from pipelines.evaluate.stage import read_scores
from pipelines.manifest import write_json
from pipelines.rundir import COMPARISON


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
    scores_AQ = np.array([[float(rows[name][key]["score"]) for key in ids] for name in arms])
    failed_AQ = np.array([[rows[name][key]["error"] is not None for key in ids] for name in arms])
    resampled_AR = statistics.bootstrap_means(scores_AQ, config.resamples, config.seed)
    base = list(arms).index(baseline)
    result: dict[str, Any] = {
        **{key: arms[baseline].get(key) for key in ("benchmark", "count", "conditions", "ocr_tokens", "images")},
        "baseline": baseline,
        "confidence": config.confidence,
        "resamples": config.resamples,
        "seed": config.seed,
        "correct_from": statistics.CORRECT_FROM,
        "arms": {},
        "differences": {},
    }
    for index, (name, arm) in enumerate(arms.items()):
        result["arms"][name] = {
            "accuracy": arm["accuracy"],
            "interval": statistics.interval(resampled_AR[index], config.confidence),
            **{key: arm.get(key) for key in ("errors", "truncated", "model", "answered_by")},
        }
        if index != base:
            pair_2Q = scores_AQ[[base, index]]
            ends = statistics.interval(resampled_AR[index] - resampled_AR[base], config.confidence)
            test = statistics.mcnemar(pair_2Q)
            shown = statistics.excludes_zero(ends, test, config.confidence)
            failures = statistics.failures(pair_2Q, failed_AQ[[base, index]], shown, config)
            result["differences"][name] = {
                "difference": statistics.difference(pair_2Q),
                "interval": ends,
                "mcnemar": test,
                "failures": failures,
                "excludes_zero": shown and not failures["forbid_a_verdict"],
                **_won_and_lost(rows[baseline], rows[name], ids, config.examples),
            }
    return result


def withheld(comparison: dict[str, Any]) -> list[str]:
    """A sentence for every arm about which failed requests forbid a verdict."""
    return [
        f"{arm} against {comparison['baseline']}: no verdict, because {_hidden(found)}; evaluating again asks them"
        for arm, found in comparison["differences"].items()
        if found["failures"]["forbid_a_verdict"]
    ]


def _hidden(found: dict[str, Any]) -> str:
    number, bounds = found["failures"]["count"], found["failures"]["bounds"]
    return f"{number} request{'s' if number > 1 else ''} failed: answered, the difference could be {_points(bounds)}"


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
    if found["failures"]["forbid_a_verdict"]:
        text += f"; no verdict, because {_hidden(found)}"
    elif not found["excludes_zero"]:
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
            "withheld": sum(entry["failures"]["forbid_a_verdict"] for entry in found),
        }
    return summary


def _won_and_lost(base: dict[str, Any], other: dict[str, Any], ids: Sequence[str], examples: int) -> dict[str, Any]:
    """Questions by who answered them better, and the most telling of them."""
    gains = {key: other[key]["score"] - base[key]["score"] for key in ids}
    lists = {
        "won": [key for key in ids if gains[key] > 0],
        "lost": [key for key in ids if gains[key] < 0],
        "tied": [key for key in ids if gains[key] == 0],
    }
    return {
        "counts": {kind: len(keys) for kind, keys in lists.items()},
        **lists,
        "examples": {
            kind: [_example(base[key], other[key]) for key in _most_telling(lists[kind], gains, examples)]
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
