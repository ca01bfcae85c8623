"""Was a phase of training steady? What its log says in numbers, and a verdict by a rule that is written down here.

A **spike** is a step whose loss lies more than 7 standard deviations above the middle of the steps before it: the spike
score of OLMo 2 (Walsh et al. 2024, arXiv:2501.00656), with two changes for runs of a hundred steps instead of hundreds
of thousands. The window is 50 logged steps instead of 1,000, and its middle and deviation are the median and
1.4826 times the median absolute deviation (the standard deviation of a normal distribution; Rousseeuw and Croux 1993),
which a spike inside of the window does not move. A deviation below 1 % of the median counts as 1 %.

A phase is **steady** when, in its log,

1. the last half has no spike: one in the first half was survived;
2. the gradient norm does not run away: the median of the last tenth is at most twice that of the whole phase;
3. the held-out loss, where it is measured, does not run away: the last one is at most 5 % above the lowest.

Fewer than 20 logged steps are too few to tell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

WINDOW, LEAST_WINDOW, SPIKE = 50, 10, 7.0
GRADIENT_GROWTH, HELD_OUT_GROWTH, LEAST_STEPS = 2.0, 1.05, 20
RULE = (
    f"Steady: no spike in the last half (a loss more than {SPIKE:g} robust standard deviations above the median of the "
    f"{WINDOW} steps before it), a gradient norm whose last tenth is at most {GRADIENT_GROWTH:g} times that of the "
    f"whole phase, and a held-out loss that ends at most {100 * HELD_OUT_GROWTH - 100:.0f} % above its lowest; of at "
    f"least {LEAST_STEPS} logged steps."
)
"""The same in a sentence, for those who read the numbers."""


@dataclass(frozen=True)
class Stability:
    """What the logged steps of one phase say.

    Attributes:
        loss: lowest and highest.
        spread: distance between the quartiles of the loss in the last half.
        spikes: steps.
        grad_norm: before clipping; medians of the first and of the last tenth.
        clipped: share of the steps whose gradients were clipped; None in logs that do not say.
        held_out: held-out loss: first, lowest, last; None where nothing was held out.
        steady: None when there are too few steps to tell.
        why: what stands against it, in words.
    """

    loss: list[float]
    spread: float
    spikes: list[int]
    grad_norm: list[float]
    clipped: float | None
    held_out: list[float] | None
    steady: bool | None
    why: list[str]

    @property
    def verdict(self) -> str:
        """In words: `steady`, `not steady: ...`, `too short to tell`."""
        if self.steady is None:
            return "too short to tell"
        return "steady" if self.steady else f"not steady: {'; '.join(self.why)}"


def measure(lines: Sequence[dict[str, Any]]) -> Stability:
    """Of the log lines of one phase, in their order; at least one."""
    losses, norms = [line["loss"] for line in lines], [line["grad_norm"] for line in lines]
    tenth, half = max(1, len(lines) // 10), len(lines) // 2
    clipped = [line["clipped"] for line in lines if "clipped" in line]
    held = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    spikes = [lines[place]["step"] for place in _spikes(losses)]
    why = _against(lines, spikes, norms, held)
    return Stability(
        loss=[min(losses), max(losses)] if all(map(math.isfinite, losses)) else [math.nan, math.nan],
        spread=_between_quartiles(losses[half:]),
        spikes=spikes,
        grad_norm=[median(norms[:tenth]), median(norms[-tenth:])],
        clipped=sum(clipped) / len(clipped) if clipped else None,
        held_out=[held[0], min(held), held[-1]] if held else None,
        steady=not why if len(lines) >= LEAST_STEPS else None,
        why=why,
    )


def _spikes(losses: Sequence[float]) -> list[int]:
    """Places of the spikes."""
    found = []
    for place in range(LEAST_WINDOW, len(losses)):
        window = losses[max(0, place - WINDOW) : place]
        middle = median(window)
        deviation = 1.4826 * median(abs(loss - middle) for loss in window)
        if not losses[place] <= middle + SPIKE * max(deviation, 0.01 * abs(middle)):
            found.append(place)
    return found


def _against(
    lines: Sequence[dict[str, Any]], spikes: Sequence[int], norms: Sequence[float], held: Sequence[float]
) -> list[str]:
    """What the rule has against a phase."""
    late = [step for step in spikes if step > lines[len(lines) // 2]["step"]]
    tenth = max(1, len(norms) // 10)
    last, whole = median(norms[-tenth:]), median(norms)
    why = [f"the loss spikes in step {late[0]}" + (f" and {len(late) - 1} more" if late[1:] else "")] if late else []
    if not last <= GRADIENT_GROWTH * whole:
        why.append(f"the gradient norm grows: {last:.3g} in the last tenth, {whole:.3g} over all")
    if held and not held[-1] <= HELD_OUT_GROWTH * min(held):
        why.append(f"the held-out loss rises from {min(held):.3g} to {held[-1]:.3g}")
    return why


def _between_quartiles(values: Sequence[float]) -> float:
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return 0.0 if len(values) < 2 else math.nan
    low, _, high = quantiles(values, method="inclusive")
    return high - low
