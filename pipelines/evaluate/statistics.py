"""What the scores of two models on the same questions show: a paired bootstrap, an exact test, and what failures hide.

Shapes: A arms, Q questions, R resamples; a pair is [baseline, arm].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pipelines.evaluate.config import CompareConfig

if TYPE_CHECKING:
    import numpy as np

CORRECT_FROM = 0.5
"""McNemar's test needs right and wrong: an answer counts as right when its soft score is at least this, which takes two
agreeing humans."""
_DRAWS_AT_ONCE = 4_000_000
_ROUNDING = 1e-12


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


def mcnemar(pair_2Q: np.ndarray) -> dict[str, Any]:
    """McNemar's test: how often each arm was right where the other was wrong, and the exact two-sided p-value."""
    from scipy.stats import binomtest

    base_Q, arm_Q = pair_2Q >= CORRECT_FROM
    won, lost = int((arm_Q & ~base_Q).sum()), int((base_Q & ~arm_Q).sum())
    return {
        "only_this_arm_correct": won,
        "only_baseline_correct": lost,
        "both_correct": int((base_Q & arm_Q).sum()),
        "neither_correct": int((~base_Q & ~arm_Q).sum()),
        "p_value": float(binomtest(won, won + lost, 0.5).pvalue) if won + lost else 1.0,
    }


def excludes_zero(ends: list[float], test: dict[str, Any], confidence: float) -> bool:
    """Whether interval and exact test agree that there is a difference.

    A bootstrap of few questions that all fall one way has no width, and would call a single question proof.
    """
    balance = test["only_this_arm_correct"] - test["only_baseline_correct"]
    agree = (ends[0] > 0 and balance > 0) or (ends[1] < 0 and balance < 0)
    return bool(agree and test["p_value"] < 1 - confidence)


def failures(pair_2Q: np.ndarray, failed_2Q: np.ndarray, shown: bool, config: CompareConfig) -> dict[str, Any]:
    """What failed requests, which score 0, may hide: answered, each might have been worth anything from 0 to 1.

    Args:
        failed_2Q: bool, which requests failed.
        shown: whether the scores as they are show a difference.

    Returns:
        `count`; `bounds`, the least and the largest difference that there could have been; and `forbid_a_verdict`:
        these have two signs, or what is shown would not be in the worst case.
    """
    import numpy as np

    worst_for_arm = np.where(failed_2Q, [[1.0], [0.0]], pair_2Q)
    best_for_arm = np.where(failed_2Q, [[0.0], [1.0]], pair_2Q)
    bounds = [difference(worst_for_arm), difference(best_for_arm)]
    forbid = bool(failed_2Q.any()) and bounds[0] <= _ROUNDING and bounds[1] >= -_ROUNDING
    if failed_2Q.any() and shown and not forbid:
        worst_2Q = worst_for_arm if difference(pair_2Q) > 0 else best_for_arm
        base_R, arm_R = bootstrap_means(worst_2Q, config.resamples, config.seed)
        ends = interval(arm_R - base_R, config.confidence)
        forbid = not excludes_zero(ends, mcnemar(worst_2Q), config.confidence)
    return {"count": int(failed_2Q.sum()), "bounds": bounds, "forbid_a_verdict": forbid}


def difference(pair_2Q: np.ndarray) -> float:
    """Mean score of the arm less that of the baseline."""
    return math.fsum(pair_2Q[1] - pair_2Q[0]) / pair_2Q.shape[1]


def _chunks(total: int, size: int) -> Iterator[int]:
    for start in range(0, total, size):
        yield min(size, total - start)
