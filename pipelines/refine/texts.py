"""Which texts of a sample are judged, and which of those that the operators kept become rows: mixes and subsets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from pipelines.errors import UserError
from pipelines.manifest import CLAIM, read_json
from pipelines.records import source_id
from pipelines.refine.apply import Outcome
from pipelines.refine.config import MixConfig, RefineConfig, SubsetConfig

MIX, SUBSET = "mix", "subset"
"""Steps that come after the operators; also the reasons of what they leave out."""


class Texts:
    """The texts of a sample, those as found first.

    Args:
        captions: the directory of the records; it says whether every candidate, or the original, makes a row.
    """

    def __init__(self, captions: Path, config: RefineConfig) -> None:
        claim = read_json(captions / CLAIM) if (captions / CLAIM).is_file() else {}
        candidates = claim.get("inputs", {}).get("candidates") or {}
        self._config = config
        self._every = candidates.get("choose") == "all"
        self._original = bool(candidates.get("keep_original"))

    def of(self, row: Mapping[str, Any]) -> list[str]:
        """One or more texts of a record; an empty one where there is none."""
        found, mix = row["caption"] or "", self._config.mix
        if self._config.text == "caption":
            return [found]
        new = list(row["candidates"] or [""]) if self._every else [row["recaption"] or ""]
        if mix.by == "random":
            return new if chance(mix.seed, row["sample_id"]) < (mix.share or 0.0) else [found]
        if mix.by in ("both", "score") or (self._original and found):
            return [found, *new]
        return new


def chance(seed: int, name: str) -> float:
    """A number from 0 to below 1 that a sample draws with a seed, whatever the data around it."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def choose(outcomes: dict[str, Outcome], mix: MixConfig, section: str) -> None:
    """Of the texts that the operators kept of a sample one stays: that of the highest score.

    Args:
        outcomes: by `text_id`; of each sample the first is the caption as found.
        section: what errors call it.

    Raises:
        UserError: no operator has computed the score.
    """
    gains: dict[str, tuple[float, str, str]] = {}
    for sample, keys in _by_sample(outcomes):
        new = sorted((key for key in keys if key != sample), key=lambda key: -_score(outcomes[key], mix, section))
        _let_go(outcomes, new[1:])
        if new and sample in keys:
            gain = _score(outcomes[new[0]], mix, section) - _score(outcomes[sample], mix, section)
            gains[sample] = gain, sample, new[0]
    ranked = sorted(gains.values(), key=lambda found: (-found[0], found[1]))
    gaining = sum(gain > 0 for gain, _, _ in ranked)
    take = gaining if mix.share is None else round(mix.share * len(ranked))
    for place, (_, old, new_one) in enumerate(ranked):
        _let_go(outcomes, [old if place < take else new_one])


def draw(outcomes: dict[str, Outcome], subset: SubsetConfig) -> None:
    """Let all but `subset.rows` of the rows go that are left."""
    left = [key for key, outcome in outcomes.items() if outcome.step is None]
    for key in sorted(left, key=lambda key: (chance(subset.seed, key), key))[subset.rows :]:
        outcomes[key].step = outcomes[key].reason = SUBSET


def _by_sample(outcomes: dict[str, Outcome]) -> Iterator[tuple[str, list[str]]]:
    """Samples with those of their texts that are left."""
    found: dict[str, list[str]] = {}
    for key, outcome in outcomes.items():
        if outcome.step is None:
            found.setdefault(source_id(key), []).append(key)
    yield from found.items()


def _score(outcome: Outcome, mix: MixConfig, section: str) -> float:
    name = mix.score.removeprefix("-")
    value = outcome.stats.get(name)
    numbers = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int | float)]
    if not numbers:
        known = ", ".join(sorted(outcome.stats)) or "none"
        raise UserError(f"{section}.mix.score: no operator of the recipe computes '{name}' (its stats: {known})")
    return -fmean(numbers) if mix.score.startswith("-") else fmean(numbers)


def _let_go(outcomes: dict[str, Outcome], keys: list[str]) -> None:
    for key in keys:
        outcomes[key].step = outcomes[key].reason = MIX
