"""Before a run: the smallest difference between two arms that its questions, pictures and seeds can show."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.evaluate import statistics
from pipelines.evaluate.config import CompareConfig
from pipelines.rundir import COMPARISON

SPREAD = 0.5
"""Assumed standard deviation of a question's difference in score: a quarter of the questions change."""
ALIKE = 0.1
"""Assumed intraclass correlation of the differences on one picture."""
SEEDS = 0.01
"""Assumed standard deviation of the difference over training seeds: one point."""


@dataclass(frozen=True)
class Foreseen:
    """What a comparison will be able to see, on the score's scale, and what that stands on."""

    least: float
    basis: str

    def __str__(self) -> str:
        return f"shows differences from {100 * self.least:.1f} points on, in 4 of 5 such runs ({self.basis})"


def foresee(questions: int, pictures: int, arms: int, seeds: int, config: CompareConfig) -> Foreseen:
    """The smallest difference that all of `arms` - 1 comparisons can show.

    Args:
        questions, pictures: of the benchmark; a picture has one question or more.

    Raises:
        UserError: `config.pilot` holds no comparison.
    """
    if config.pilot:
        of_pictures, spread, found = _of_pilot(config.pilot, pictures)
        basis = f"scaled from {found} of {config.pilot}"
    else:
        crowded = 1 + (questions / pictures - 1) * ALIKE
        of_pictures, spread = SPREAD**2 / questions * crowded, SEEDS
        basis = f"assumed: standard deviation {SPREAD:g} a question, correlation {ALIKE:g} on a picture"
    parts = [(of_pictures, max(pictures - 1, 1))]
    if seeds > 1:
        parts.append((spread**2 / seeds, seeds - 1))
        basis += f", {100 * spread:.1f} points over seeds"
    else:
        basis += "; one seed, whose luck it does not see"
    error = math.sqrt(sum(variance for variance, _ in parts))
    confidence = 1 - (1 - config.confidence) / max(arms - 1, 1)  # Holm's first step
    return Foreseen(statistics.detectable(error, statistics.satterthwaite(parts), confidence), basis)


def _of_pilot(place: str, pictures: int) -> tuple[float, float, str]:
    """Variance over so many pictures, standard deviation over seeds, and the arm with the larger variance."""
    path = Path(place) / COMPARISON if Path(place).is_dir() else Path(place)
    try:
        pilot: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = {name: entry["detectable"] for name, entry in pilot["differences"].items() if entry["detectable"]}
        measured, confidence = int(pilot["pictures"]), float(pilot["confidence"])
        name = max(found, key=lambda key: found[key])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"compare.pilot: {path} holds no comparison that this version wrote ({error!r})") from error
    unit = statistics.detectable(1.0, measured - 1, confidence)
    over_seeds = pilot.get("summary", {}).get("differences", {}).get(name, {}).get("standard_deviation", SEEDS)
    return (found[name] / unit) ** 2 * measured / pictures, float(over_seeds), name
