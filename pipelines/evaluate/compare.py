"""Evaluations of the same questions side by side: paired intervals, a permutation test, questions won and lost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.evaluate import statistics
from pipelines.evaluate.config import CompareConfig
from pipelines.evaluate.stage import read_scores
from pipelines.manifest import write_json
from pipelines.overlapping import overlapping
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
    """The comparison of `scores.json` contents. All intervals come from the same resamples of pictures, so they are
    paired.
    """
    baseline = config.baseline_among(arms)
    rows = {name: {row["question_id"]: row for row in arm["questions"]} for name, arm in arms.items()}
    ids = [row["question_id"] for row in arms[baseline]["questions"]]
    table = _Table.of(rows, ids, baseline)
    resampled_AR = statistics.bootstrap_means(table.scores_AQ, table.pictures, config.resamples, config.seed)
    base = list(arms).index(baseline)
    pairs = {name: [base, index] for index, name in enumerate(arms) if index != base}
    p_values = {
        name: statistics.sign_flips(table.scores_AQ[pair], table.pictures, config.resamples, config.seed)
        for name, pair in pairs.items()
    }
    result: dict[str, Any] = {
        **{
            key: arms[baseline].get(key)
            for key in ("benchmark", "drawn", "count", "conditions", "ocr_tokens", "images")
        },
        "baseline": baseline,
        "pictures": table.pictures.number,
        "confidence": config.confidence,
        "margin": config.margin,
        "resamples": config.resamples,
        "seed": config.seed,
        "correct_from": statistics.CORRECT_FROM,
        "arms": {},
        "differences": {},
    }
    together = statistics.holm(p_values)
    for index, (name, arm) in enumerate(arms.items()):
        result["arms"][name] = {
            "accuracy": arm["accuracy"],
            "interval": statistics.interval(resampled_AR[index], config.confidence, table.pictures.number),
            **{key: arm.get(key) for key in ("errors", "truncated", "model", "answered_by")},
        }
        if name in pairs:
            resampled_R = resampled_AR[index] - resampled_AR[base]
            result["differences"][name] = {
                **_difference(table.pair(pairs[name]), resampled_R, together[name], config),
                "p_value": p_values[name],
                **_won_and_lost(rows[baseline], rows[name], ids, config.examples),
                "kinds": _by_kind(rows[baseline], rows[name], ids),
            }
    return result | _without_overlap(arms, config)


def _without_overlap(arms: dict[str, dict[str, Any]], config: CompareConfig) -> dict[str, Any]:
    """`clean`: the same without the questions whose picture training data show; nothing where that was not looked for
    in this benchmark.
    """
    baseline = config.baseline_among(arms)
    found = overlapping(config.overlap, "compare.overlap") if config.overlap else None
    if found is None or found["benchmark"] != arms[baseline].get("benchmark"):
        return {}
    known = set(found["contaminated"])
    left = {name: [row for row in arm["questions"] if row["question_id"] not in known] for name, arm in arms.items()}
    count = len(left[baseline])
    clean: dict[str, Any] = {"left_out": len(arms[baseline]["questions"]) - count, "count": count}
    if not clean["left_out"] or not count:
        return {"clean": clean}
    fewer = {
        name: arm | {"questions": left[name], "accuracy": math.fsum(row["score"] for row in left[name]) / count}
        for name, arm in arms.items()
    }
    same = compare(fewer, replace(config, overlap=""))
    clean["arms"] = {name: {key: arm[key] for key in ("accuracy", "interval")} for name, arm in same["arms"].items()}
    kept = ("difference", "interval", "p_value_together", "excludes_zero")
    clean["differences"] = {name: {key: each[key] for key in kept} for name, each in same["differences"].items()}
    return {"clean": clean}


def clean_sentence(comparison: dict[str, Any], arm: str) -> str:
    """What is left of an arm's result without the questions whose picture is trained on; empty where nobody looked."""
    clean = comparison.get("clean")
    if clean is None:
        return ""
    if not clean["left_out"]:
        return "no question's picture is among those that were trained on"
    if not clean["count"]:
        return "every question's picture was trained on"
    found = clean["differences"][arm]
    return (
        f"without the {clean['left_out']} questions whose picture was trained on {100 * found['difference']:+.1f} "
        f"points ({_points(found['interval'])}){'' if found['excludes_zero'] else ', which does not exclude zero'}"
    )


@dataclass(frozen=True)
class _Table:
    """Scores [arms, questions], which of them are of failed requests, and the questions' pictures."""

    scores_AQ: Any
    failed_AQ: Any
    pictures: statistics.Pictures

    @classmethod
    def of(cls, rows: dict[str, dict[str, Any]], ids: Sequence[str], baseline: str) -> _Table:
        import numpy as np

        scores_AQ = np.array([[float(arm[key]["score"]) for key in ids] for arm in rows.values()])
        failed_AQ = np.array([[arm[key]["error"] is not None for key in ids] for arm in rows.values()])
        return cls(scores_AQ, failed_AQ, statistics.Pictures.named([rows[baseline][key]["image_id"] for key in ids]))

    def pair(self, arms: list[int]) -> _Table:
        return _Table(self.scores_AQ[arms], self.failed_AQ[arms], self.pictures)


def _difference(pair: _Table, resampled_R: Any, p_value: float, config: CompareConfig) -> dict[str, Any]:
    """One arm against the baseline, `p_value` as it holds for all arms together."""
    number = pair.pictures.number
    ends = statistics.interval(resampled_R, config.confidence, number)
    counts = statistics.right_and_wrong(pair.scores_AQ)
    shown = statistics.excludes_zero(ends, p_value, counts, config.confidence)
    failures = statistics.failures(pair.scores_AQ, pair.failed_AQ, pair.pictures, shown, config)
    error = statistics.standard_error(resampled_R, number)
    return {
        "difference": statistics.difference(pair.scores_AQ),
        "interval": ends,
        "p_value_together": p_value,
        "right": counts,
        "failures": failures,
        "excludes_zero": shown and not failures["forbid_a_verdict"],
        "equivalent": _equivalent(ends, number, config) and not failures["forbid_a_verdict"],
        "detectable": _detectable(error, max(number - 1, 1), config),
    }


def _equivalent(ends: Sequence[float], pictures: int, config: CompareConfig) -> bool:
    """Whether the interval lies within the margin; one picture shows nothing."""
    return pictures > 1 and -config.margin < ends[0] and ends[1] < config.margin


def _detectable(error: float, freedom: float, config: CompareConfig) -> float | None:
    """`statistics.detectable` where there is such a difference: not where nothing varies, nor of one picture."""
    least = statistics.detectable(error, freedom, config.confidence)
    return least if 0 < least < math.inf else None


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
    several = len(comparison["differences"]) > 1
    text = (
        f"{arm} {100 * comparison['arms'][arm]['accuracy']:.1f} %, "
        f"{baseline} {100 * comparison['arms'][baseline]['accuracy']:.1f} %: "
        f"difference {100 * found['difference']:+.1f} points, {level(comparison['confidence'])} % interval "
        f"{_points(found['interval'])} over {comparison['pictures']} pictures, "
        f"p = {found['p_value_together']:.2g}{' for all arms together' if several else ''}"
    )
    if found["failures"]["forbid_a_verdict"]:
        return text + f"; no verdict, because {_hidden(found)}"
    if not found["excludes_zero"]:
        text += "; does not exclude zero"
        if not found["interval"][0] <= 0 <= found["interval"][1]:
            text += f": {found['right']['only_this_arm_correct']} questions won and "
            text += f"{found['right']['only_baseline_correct']} lost are too few"
    if found["equivalent"]:
        text += f"; equal within {100 * comparison['margin']:g} point(s)"
    elif not found["excludes_zero"] and found["detectable"] is not None:
        text += f"; {100 * found['detectable']:.1f} points would have been seen in 4 of 5 such runs"
    clean = clean_sentence(comparison, arm)
    return f"{text}; {clean}" if clean else text


def level(confidence: float) -> str:
    """The confidence in per cent, never rounded to certainty: `95`, `99.9`."""
    return f"{round(100 * confidence, 10):.12g}"


def _points(ends: Sequence[float]) -> str:
    return f"{100 * ends[0]:+.1f} to {100 * ends[1]:+.1f}"


def summarise(comparisons: Sequence[dict[str, Any]], config: CompareConfig) -> dict[str, Any]:
    """Several seeds' comparisons as one: per arm the difference to the baseline in each, its mean, and an interval over
    pictures and seeds together.

    Raises:
        UserError: fewer than two comparisons, or comparisons of different arms or questions.
    """
    if len(comparisons) < 2:
        raise UserError("a summary needs the comparisons of at least two seeds")
    first = comparisons[0]
    names = list(first["differences"])
    for other in comparisons:
        if list(other["differences"]) != names or other["baseline"] != first["baseline"]:
            raise UserError("only comparisons of the same arms with the same baseline can be summarised")
    tables = [_read(comparison) for comparison in comparisons]
    if any(sorted(table) != sorted(tables[0]) for table in tables):
        raise UserError("only comparisons of the same questions can be summarised")
    summary: dict[str, Any] = {"baseline": first["baseline"], "seeds": len(comparisons), "pictures": first["pictures"]}
    found = {name: _over_seeds(comparisons, tables, name, config) for name in names}
    together = statistics.holm({name: entry["p_value"] for name, entry in found.items()})
    for name, entry in found.items():
        low, high = entry["interval"]
        zero = not low <= 0 <= high and together[name] < 1 - config.confidence
        entry |= {"p_value_together": together[name], "excludes_zero": zero and not entry["withheld"]}
    return summary | {"differences": found}


def _read(comparison: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Question -> arm -> its row, and under `""` the picture's id."""
    table: dict[str, dict[str, Any]] = {}
    for name, place in comparison["evaluations"].items():
        for row in read_scores(Path(place))["questions"]:
            table.setdefault(row["question_id"], {"": row["image_id"]})[name] = row
    return table


def _over_seeds(
    comparisons: Sequence[dict[str, Any]],
    tables: Sequence[dict[str, dict[str, Any]]],
    name: str,
    config: CompareConfig,
) -> dict[str, Any]:
    import numpy as np
    from scipy.stats import t

    baseline, ids = comparisons[0]["baseline"], sorted(tables[0])
    differences_SQ = np.array(
        [[float(table[key][name]["score"]) - float(table[key][baseline]["score"]) for key in ids] for table in tables]
    )
    pictures = statistics.Pictures.named([tables[0][key][""] for key in ids])
    ends, error, freedom = statistics.over_seeds(differences_SQ, pictures, config)
    each = [entry["differences"][name]["difference"] for entry in comparisons]
    mean = math.fsum(each) / len(each)
    return {
        "each": each,
        "mean": mean,
        "standard_deviation": float(np.std(each, ddof=1)),
        "interval": ends,
        "p_value": float(2 * t.sf(abs(mean) / error, freedom)) if error > 0 else float(mean == 0),
        "equivalent": _equivalent(ends, pictures.number, config),
        "detectable": _detectable(error, freedom, config),
        "same_sign": all(value > 0 for value in each) or all(value < 0 for value in each),
        "intervals_exclude_zero": sum(entry["differences"][name]["excludes_zero"] for entry in comparisons),
        "withheld": sum(entry["differences"][name]["failures"]["forbid_a_verdict"] for entry in comparisons),
    }


def summary_sentence(comparison: dict[str, Any], arm: str) -> str:
    """The result over all seeds for one arm in words."""
    summary = comparison["summary"]
    found = summary["differences"][arm]
    text = (
        f"{arm} over {summary['seeds']} seeds: {100 * found['mean']:+.1f} points, "
        f"{level(comparison['confidence'])} % interval {_points(found['interval'])} over {summary['pictures']} "
        f"pictures and the seeds, p = {found['p_value_together']:.2g}"
    )
    if found["withheld"]:
        return text + "; no verdict, because of failed requests"
    if not found["excludes_zero"]:
        text += "; does not exclude zero"
    if found["equivalent"]:
        text += f"; equal within {100 * comparison['margin']:g} point(s)"
    return text


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


def _by_kind(base: dict[str, Any], other: dict[str, Any], ids: Sequence[str]) -> dict[str, dict[str, float]]:
    """Kind of question -> how many there are, both scores, and how many were won and lost; empty where the benchmark
    knows one kind.
    """
    kinds: dict[str, list[str]] = {}
    for key in ids:
        kinds.setdefault(base[key].get("kind") or "", []).append(key)
    found = {}
    for kind, keys in sorted(kinds.items()) if len(kinds) > 1 else ():
        pairs = [(base[key]["score"], other[key]["score"]) for key in keys]
        found[kind] = {
            "count": len(keys),
            "baseline": math.fsum(before for before, _ in pairs) / len(keys),
            "arm": math.fsum(after for _, after in pairs) / len(keys),
            "won": sum(after > before for before, after in pairs),
            "lost": sum(after < before for before, after in pairs),
        }
    return found


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
