"""The verdict on a training log: made of logs that show one fault each, so that a blind rule would let it pass."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from pipelines.train.stability import measure


def _log(
    steps: int = 100,
    loss: Callable[[int], float] = lambda step: 6.0 - step / 100,
    norm: Callable[[int], float] = lambda step: 4.0 * math.exp(-step / 50),
    held: Callable[[int], float] = lambda step: 2.0 - step / 200,
) -> list[dict[str, Any]]:
    rng, lines = random.Random(0), []
    for step in range(1, steps + 1):
        line = {"step": step, "loss": loss(step) + rng.gauss(0, 0.1), "grad_norm": norm(step), "clipped": step <= 25}
        lines.append(line | ({"held_out_loss": held(step)} if step % 10 == 0 or step == 1 else {}))
    return lines


def test_the_numbers_of_a_quiet_run() -> None:
    lines = _log()
    found = measure(lines)
    assert found.steady is True and found.verdict == "steady" and not found.why
    assert found.loss == [min(line["loss"] for line in lines), max(line["loss"] for line in lines)]
    assert 0.2 < found.spread < 0.45  # noise of 0.1 on a slope of 0.5 over the last half
    assert found.grad_norm[0] == pytest.approx(4 * math.exp(-5.5 / 50), rel=0.01)
    assert found.grad_norm[1] == pytest.approx(4 * math.exp(-95.5 / 50), rel=0.01)
    assert found.clipped == 0.25
    assert found.held_out == [2.0 - 1 / 200, 1.5, 1.5]


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ({"loss": lambda step: 6.0 + 3.0 * (step == 80)}, "the loss spikes in step 80"),
        ({"loss": lambda step: 6.0 if step < 70 else 6.0 + 0.1 * (step - 70)}, "the loss spikes in step 7"),
        ({"norm": lambda step: 1.0 if step < 80 else 5.0}, "the gradient norm grows"),
        ({"held": lambda step: 2.0 + abs(step - 50) / 100}, "the held-out loss rises from 2 to 2.5"),
    ],
)
def test_each_fault_alone_is_seen(fault: dict[str, Any], why: str) -> None:
    """A spike, a loss that climbs, a gradient that grows, a held-out loss that turns."""
    found = measure(_log(**fault))
    assert found.steady is False
    assert [reason.startswith(why) for reason in found.why] == [True]


def test_an_early_spike_is_counted_and_forgiven() -> None:
    found = measure(_log(loss=lambda step: 6.0 + 3.0 * (step == 30)))
    assert found.spikes == [30] and found.steady is True


def test_few_steps_are_no_verdict_and_old_logs_are_read() -> None:
    """Logs written before clipping and the held-out loss were in them."""
    lines = [{key: line[key] for key in ("step", "loss", "grad_norm")} for line in _log(19)]
    found = measure(lines)
    assert found.steady is None and found.clipped is None and found.held_out is None
    assert measure(lines[:1]).spread == 0.0
