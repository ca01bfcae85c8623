"""How scores grow with rows, from a few small trainings, and what that says of a large one.

Two steps, as Grattafiori et al. 2024 (Llama 3, arXiv:2407.21783, section 3.2.1) and Bhagia et al. 2024
(arXiv:2412.04403) take them, because accuracy jumps where likelihood glides (Schaeffer et al. 2023, arXiv:2304.15004):

1. The negative log-likelihood L of the right answer falls as a power of the rows D: log L = a - b log D, for each arm
   (Hestness et al. 2017, arXiv:1712.00409; Kaplan et al. 2020, arXiv:2001.08361). A power law that levels off at what
   cannot be learned bends upwards, and one that has not yet begun bends downwards; three rungs cannot tell a floor from
   a slope, so a bend is allowed for with a prior of its own size, and widens the interval where it is not seen.
2. Accuracy A follows L by one curve for all arms, rungs and seeds: log(-log A) = u + v log L, so that A goes to 1 as L
   goes to 0 and to 0 as L grows. Together with 1, -log A is a power of the rows, which is the form that Krajewski et
   al. 2025 (arXiv:2512.08894) find to extrapolate best.

Both are linear; their coefficients and the noise (seeds, and what the forms miss) are drawn from their posterior, and
the gain at the full size from those: an interval for what one run of the recipe will measure.

Shapes: R drawings, F points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

BEND = 0.06
"""Prior standard deviation of the bend: how much the slope of log L changes from one doubling of the rows to the
next."""
NOISE, NOISE_POINTS = 0.05, 2.0
"""Prior guess of the noise of log L and of log(-log A), and how many points that guess is worth: a few points that
happen to lie on a line are no proof that there is none."""
DRAWINGS = 10_000
_LEAST, _MOST = 1e-4, 1 - 1e-4
"""Accuracies outside of these have no finite log(-log A)."""


@dataclass(frozen=True)
class Point:
    """One small model.

    Attributes:
        arm: its name.
        share: of the rows, e.g. 1/16.
        seed: of training.
        accuracy: its score, in [0, 1].
        loss: negative log-likelihood of the right answer in nats, mean over questions; positive.
    """

    arm: str
    share: float
    seed: int
    accuracy: float
    loss: float


def extrapolate(points: Sequence[Point], baseline: str, confidence: float, seed: int) -> dict[str, Any]:
    """Arm -> what it will score on all rows, and its gain over the baseline.

    Returns:
        `baseline`, and `arms`: name -> `accuracy`, `loss` and (but for the baseline) `gain`, each with `value`, the
        median, and `interval`, which holds what a run will measure with the given confidence; `bend`, by how much the
        slope of log L changes with each doubling of the rows.
    """
    import numpy as np

    random = np.random.default_rng(seed)
    arms = list(dict.fromkeys(point.arm for point in points))
    to_score_R3 = _accuracy_law(points, random)
    accuracy, found = {}, {}
    for arm in arms:
        log_loss_R, bend = _loss_at_full([point for point in points if point.arm == arm], random)
        u_R, v_R, noise_R = to_score_R3
        hidden_R = u_R + v_R * log_loss_R + noise_R * random.standard_normal(DRAWINGS)
        accuracy[arm] = np.exp(-np.exp(np.clip(hidden_R, -20, 20)))
        found[arm] = {
            "accuracy": _summary(accuracy[arm], confidence),
            "loss": _summary(np.exp(log_loss_R), confidence),
            "bend": bend,
        }
    for arm in arms:
        if arm != baseline:
            found[arm]["gain"] = _summary(accuracy[arm] - accuracy[baseline], confidence)
    return {"baseline": baseline, "arms": found}


def _loss_at_full(points: Sequence[Point], random: np.random.Generator) -> tuple[np.ndarray, float]:
    """Drawings of log L at all rows, the noise of a run included; and the mean bend a doubling."""
    import numpy as np

    x_F = np.log2([point.share for point in points])
    middle = x_F.mean()
    y_F = np.log([point.loss for point in points])
    at_FK = np.stack([np.ones_like(x_F), x_F - middle, (x_F - middle) ** 2 / 2], axis=1)
    prior_K = np.array([0.0, 0.0, BEND**-2])
    coefficients_RK, noise_R = _posterior(at_FK, y_F, prior_K, random)
    full_K = np.array([1.0, -middle, middle**2 / 2])
    drawn_R = coefficients_RK @ full_K + noise_R * random.standard_normal(DRAWINGS)
    return drawn_R, float(coefficients_RK[:, 2].mean())


def _accuracy_law(points: Sequence[Point], random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Drawings of u, v and the noise. That v is about 1 (where every question is as hard, A is exp(-L)) is a guess that
    few points soon outweigh.
    """
    import numpy as np

    x_F = np.log([point.loss for point in points])
    y_F = np.log(-np.log(np.clip([point.accuracy for point in points], _LEAST, _MOST)))
    at_FK = np.stack([np.ones_like(x_F), x_F], axis=1)
    coefficients_RK, noise_R = _posterior(at_FK, y_F - x_F, np.array([0.0, 1.0]), random)
    return coefficients_RK[:, 0], 1 + coefficients_RK[:, 1], noise_R


def _posterior(
    at_FK: np.ndarray, y_F: np.ndarray, prior_K: np.ndarray, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Drawings of coefficients, float [R, K], and of the noise, float [R], of a linear regression.

    Args:
        prior_K: precision of each coefficient about 0, beside what the points say; 0: anything.
    """
    import numpy as np

    points, free = len(y_F), int((prior_K == 0).sum())
    noise = _noise(at_FK, y_F, prior_K)
    degrees = max(points - free, 0) + NOISE_POINTS
    squares = noise**2 * max(points - free, 0) + NOISE**2 * NOISE_POINTS
    noise_R = np.sqrt(squares / random.chisquare(degrees, DRAWINGS))
    gram_KK, moment_K = at_FK.T @ at_FK, at_FK.T @ y_F
    precision_RKK = gram_KK / noise_R[:, None, None] ** 2 + np.diag(prior_K)
    mean_RK = np.linalg.solve(precision_RKK, (moment_K / noise_R[:, None] ** 2)[..., None])[..., 0]
    lower_RKK = np.linalg.cholesky(np.linalg.inv(precision_RKK))
    coefficients_RK = mean_RK + (lower_RKK @ random.standard_normal((DRAWINGS, len(prior_K), 1)))[..., 0]
    return coefficients_RK, noise_R


def _noise(at_FK: np.ndarray, y_F: np.ndarray, prior_K: np.ndarray) -> float:
    """Spread of the points about the best curve of all coefficients that they can tell."""
    import numpy as np

    precision_KK = at_FK.T @ at_FK / NOISE**2 + np.diag(prior_K)
    best_K = np.linalg.lstsq(precision_KK, at_FK.T @ y_F / NOISE**2, rcond=None)[0]
    left_F = y_F - at_FK @ best_K
    return math.sqrt(float((left_F**2).sum()) / max(len(y_F) - int((prior_K == 0).sum()), 1))


def _summary(drawn_R: np.ndarray, confidence: float) -> dict[str, Any]:
    import numpy as np

    low, middle, high = np.quantile(drawn_R, [(1 - confidence) / 2, 0.5, (1 + confidence) / 2])
    return {"value": float(middle), "interval": [float(low), float(high)]}
