"""What the scores of two models on the same questions show: paired intervals over pictures and training seeds, a
permutation test, the difference that could have been seen, and what failures hide.

Questions about one picture are right or wrong together, so pictures are what is drawn from, not questions: on
simulated scores with 18 questions a picture an interval over questions, meant to hold the truth 95 times in 100, holds
it 65 times (tests/pipelines/evaluate/test_statistics.py).

Shapes: A arms, Q questions, P pictures, R resamples; a pair is [baseline, arm].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.evaluate.config import CompareConfig

if TYPE_CHECKING:
    import numpy as np

CORRECT_FROM = 0.5
"""An answer counts as right when its soft score is at least this, which takes two agreeing humans."""
POWER = 0.8
"""How often a run like this one would show the smallest difference that it is said to be able to see."""
_DRAWS_AT_ONCE = 4_000_000
_EXACT_UP_TO = 14
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Pictures:
    """Which questions share a picture.

    Attributes:
        of_Q: int [questions], the picture of each, from 0 to `number` - 1.
        number: of pictures.
    """

    of_Q: np.ndarray
    number: int

    @classmethod
    def named(cls, ids: Sequence[str]) -> Pictures:
        """From the picture's id of each question."""
        import numpy as np

        names, of_Q = np.unique(np.array(ids, dtype=str), return_inverse=True)
        return cls(of_Q, len(names))

    def sums(self, scores_AQ: np.ndarray) -> np.ndarray:
        """float [arms, pictures]: the scores of each picture's questions, added up."""
        import numpy as np

        return np.array([np.bincount(self.of_Q, scores_Q, self.number) for scores_Q in scores_AQ])

    def sizes(self) -> np.ndarray:
        """float [pictures]: questions of each."""
        import numpy as np

        return np.bincount(self.of_Q, minlength=self.number).astype(float)


def bootstrap_means(scores_AQ: np.ndarray, pictures: Pictures, resamples: int, seed: int) -> np.ndarray:
    """Mean score of each arm in each resample of the pictures (drawn with replacement, with all of their questions, the
    same pictures for all arms).

    Args:
        scores_AQ: float [arms, questions].

    Returns:
        float [arms, resamples].
    """
    import numpy as np

    random = np.random.default_rng(seed)
    sums_PA, sizes_P = pictures.sums(scores_AQ).T, pictures.sizes()
    each = np.full(pictures.number, 1 / pictures.number)
    means = []
    for count in _chunks(resamples, max(1, _DRAWS_AT_ONCE // pictures.number)):
        drawn_RP = random.multinomial(pictures.number, each, size=count).astype(float)
        means.append((drawn_RP @ sums_PA).T / (drawn_RP @ sizes_P))
    return np.concatenate(means, axis=1)


def interval(samples: np.ndarray, confidence: float, pictures: int) -> list[float]:
    """Percentile interval [low, high] of a bootstrap over so many pictures, widened as Student's t is against the
    normal distribution ("expanded percentile", Hesterberg 2015, The American Statistician 69:371).
    """
    import numpy as np
    from scipy.stats import norm, t

    outside = (1 - confidence) / 2
    if pictures > 1:
        outside = norm.sf(t.isf(outside, pictures - 1) * math.sqrt(pictures / (pictures - 1)))
    low, high = np.quantile(samples, [outside, 1 - outside])
    return [float(low), float(high)]


def standard_error(samples: np.ndarray, pictures: int) -> float:
    """Of the mean, from a bootstrap over so many pictures; infinite where there is one."""
    return float(samples.std() * math.sqrt(pictures / (pictures - 1))) if pictures > 1 else math.inf


def detectable(error: float, freedom: float, confidence: float) -> float:
    """The smallest true difference that would be shown in 4 of 5 runs like this, given the standard error of the
    difference and its degrees of freedom.
    """
    from scipy.stats import t

    if not math.isfinite(error):
        return math.inf
    return float((t.isf((1 - confidence) / 2, freedom) + t.ppf(POWER, freedom)) * error)


def sign_flips(pair_2Q: np.ndarray, pictures: Pictures, resamples: int, seed: int) -> float:
    """p-value of a difference: how often it is as large when each picture's may as well have had the other sign.

    Exact for up to 14 pictures on which the arms differ, else over `resamples` draws, never 0.
    """
    import numpy as np

    (differences_P,) = pictures.sums((pair_2Q[1] - pair_2Q[0])[None])
    differences_P = differences_P[np.abs(differences_P) > _ROUNDING]
    number, seen = len(differences_P), abs(differences_P.sum()) - _ROUNDING * max(1, len(differences_P))
    if number <= _EXACT_UP_TO:
        bits = (np.arange(2**number)[:, None] >> np.arange(number)) & 1
        return float((np.abs((1 - 2 * bits) @ differences_P) >= seen).mean())
    random, larger = np.random.default_rng(seed), 0
    for count in _chunks(resamples, max(1, _DRAWS_AT_ONCE // number)):
        signs = random.integers(0, 2, size=(count, number), dtype=np.int8) * 2 - 1
        larger += int((np.abs(signs.astype(float) @ differences_P) >= seen).sum())
    return (1 + larger) / (1 + resamples)


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """p-values that hold for all arms together (Holm 1979, Scandinavian Journal of Statistics 6:65)."""
    adjusted: dict[str, float] = {}
    least = 0.0
    for rank, (name, value) in enumerate(sorted(p_values.items(), key=lambda entry: entry[1])):
        least = max(least, min(1.0, (len(p_values) - rank) * value))
        adjusted[name] = least
    return {name: adjusted[name] for name in p_values}


def satterthwaite(parts: Sequence[tuple[float, float]]) -> float:
    """Degrees of freedom of a sum of variances, each given with its own; the first's where nothing varies (1946,
    Biometrics Bulletin 2:110).
    """
    squares = sum(variance**2 / freedom for variance, freedom in parts)
    return sum(variance for variance, _ in parts) ** 2 / squares if squares > 0 else float(parts[0][1])


def over_seeds(
    differences_SQ: np.ndarray, pictures: Pictures, config: CompareConfig
) -> tuple[list[float], float, float]:
    """A mean difference over training seeds, with pictures and seeds both as drawn: other pictures and other seeds
    would have given another.

    The two variances are added, that of the pictures from a bootstrap of the seeds' mean difference, that of the seeds
    from their spread; degrees of freedom are `satterthwaite`'s.

    Args:
        differences_SQ: float [seeds, questions], at least two seeds.

    Returns:
        Interval [low, high], standard error, degrees of freedom.
    """
    from scipy.stats import t

    seeds, number = len(differences_SQ), pictures.number
    each_S = differences_SQ.mean(axis=1)
    drawn = bootstrap_means(differences_SQ.mean(axis=0)[None], pictures, config.resamples, config.seed)[0]
    of_pictures, of_seeds = standard_error(drawn, number) ** 2, float(each_S.var(ddof=1)) / seeds
    variance = of_pictures + of_seeds
    if not math.isfinite(variance):
        return [-1.0, 1.0], math.inf, 1.0
    freedom = satterthwaite([(of_pictures, number - 1), (of_seeds, seeds - 1)])
    mean, wide = float(each_S.mean()), float(t.isf((1 - config.confidence) / 2, freedom) * math.sqrt(variance))
    return [mean - wide, mean + wide], math.sqrt(variance), freedom


def right_and_wrong(pair_2Q: np.ndarray) -> dict[str, int]:
    """How often each arm was right where the other was wrong, and both or neither."""
    base_Q, arm_Q = pair_2Q >= CORRECT_FROM
    return {
        "only_this_arm_correct": int((arm_Q & ~base_Q).sum()),
        "only_baseline_correct": int((base_Q & ~arm_Q).sum()),
        "both_correct": int((base_Q & arm_Q).sum()),
        "neither_correct": int((~base_Q & ~arm_Q).sum()),
    }


def excludes_zero(ends: list[float], p_value: float, counts: dict[str, int], confidence: float) -> bool:
    """Whether there is a difference: the interval says so, the permutation test agrees, and more questions were won
    than lost.

    A bootstrap of few pictures that all fall one way has no width, and would call a single one proof.
    """
    balance = counts["only_this_arm_correct"] - counts["only_baseline_correct"]
    agree = (ends[0] > 0 and balance > 0) or (ends[1] < 0 and balance < 0)
    return bool(agree and p_value < 1 - confidence)


def failures(
    pair_2Q: np.ndarray, failed_2Q: np.ndarray, pictures: Pictures, shown: bool, config: CompareConfig
) -> dict[str, Any]:
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
        base_R, arm_R = bootstrap_means(worst_2Q, pictures, config.resamples, config.seed)
        ends = interval(arm_R - base_R, config.confidence, pictures.number)
        p_value = sign_flips(worst_2Q, pictures, config.resamples, config.seed)
        forbid = not excludes_zero(ends, p_value, right_and_wrong(worst_2Q), config.confidence)
    return {"count": int(failed_2Q.sum()), "bounds": bounds, "forbid_a_verdict": forbid}


def difference(pair_2Q: np.ndarray) -> float:
    """Mean score of the arm less that of the baseline."""
    return math.fsum(pair_2Q[1] - pair_2Q[0]) / pair_2Q.shape[1]


def _chunks(total: int, size: int) -> Iterator[int]:
    for start in range(0, total, size):
        yield min(size, total - start)
