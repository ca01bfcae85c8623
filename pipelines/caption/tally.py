"""What a captioning run looks like while it runs: counts, speed, rolling quality of the text, guards, and Ray metrics.

`Tally` is an actor that takes no CPU; every replica reports its batches there. It exports through `ray.util.metrics`
(with Ray's own prefix, so `captune_caption_images_total` is scraped as `ray_captune_caption_images_total`):

    captune_caption_images_total        counter   rows through the model's stage, failed ones among them
    captune_caption_failed_total        counter   rows that failed; tag `kind`
    captune_caption_images_per_second   gauge     over the last half minute
    captune_caption_remaining_images    gauge     rows still to do
    captune_caption_error_share         gauge     0 to 1, over the last `caption.guards.window` rows, as the next three
    captune_caption_mean_words          gauge     words per caption
    captune_caption_lexical_diversity   gauge     unique words / words
    captune_caption_repetition          gauge     mean share of two-word sequences that a caption says more than once

What a word is, and how repetition is counted, `pipelines.text` says, as it does for manifests and `captune stats`.
"""

from __future__ import annotations

import random
import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

from pipelines.caption.guards import GuardConfig, judge
from pipelines.caption.reservoir import Reservoir
from pipelines.caption.window import Window

_SHEET = 24
_SPEED_SECONDS = 30.0

Example = tuple[bytes, str, str | None]
"""JPEG, caption as found, caption made."""


@dataclass(frozen=True)
class Live:
    """One look at a run: `rows` and `failed` of this run, the rest over the guards' window."""

    rows: int = 0
    failed: int = 0
    images_per_second: float = 0.0
    error_share: float = 0.0
    mean_words: float = 0.0
    lexical_diversity: float = 0.0
    repetition: float = 0.0
    stop: str = ""

    def notes(self) -> str:
        """The live figures as the terminal shows them."""
        errors = f"{100 * self.error_share:.1f} % errors, " if self.failed else ""
        return (
            f"{errors}{self.mean_words:.1f} words, diversity {self.lexical_diversity:.3f}, repetition "
            f"{self.repetition:.2f}"
        )


class Tally:
    """Counts of this run. Retried batches count twice here, which is why only people, metrics and guards read it.

    Args:
        remaining: rows to do.
        guards: limits; `add` answers with the reason once one is passed.
    """

    def __init__(self, remaining: int, guards: GuardConfig) -> None:
        self._guards, self._remaining = guards, remaining
        self.rows, self.failed = 0, Counter[str]()
        self._recent = Window(guards.window)
        self._moments: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])
        self._last_error = ""
        self._stop = ""
        self._sheet: Reservoir[Example] = Reservoir(_SHEET)
        self._metrics = _Metrics()

    def add(self, texts: list[str], errors: list[tuple[str, str]], examples: list[Example]) -> str:
        """One more batch is through: captions, (kind, error) of failed rows, pictures to show; the reason to stop, or
        nothing.
        """
        kinds = Counter(kind for kind, _ in errors)
        self.rows += len(texts) + len(errors)
        self.failed += kinds
        mixed = [*texts, *[None] * len(errors)]
        random.shuffle(mixed)  # a window that ends inside a batch must not hold its errors only
        for text in mixed:
            self._recent.add(text)
        if errors:
            self._last_error = errors[-1][1]
        for example in examples:
            self._sheet.offer(example)
        self._moments.append((time.monotonic(), self.rows))
        self._stop = self._stop or judge(self._recent, self._guards, self.failed, self._last_error)
        live = self.live()
        self._metrics.update(len(mixed), kinds, live, max(self._remaining - self.rows, 0))
        return self._stop

    def live(self) -> Live:
        """How the run stands."""
        recent = self._recent
        while len(self._moments) > 2 and self._moments[-1][0] - self._moments[0][0] > _SPEED_SECONDS:
            self._moments.popleft()
        (since, before), now = self._moments[0], time.monotonic()
        return Live(
            rows=self.rows,
            failed=self.failed.total(),
            images_per_second=(self.rows - before) / max(now - since, 1e-9),
            error_share=recent.error_share,
            mean_words=recent.mean_words,
            lexical_diversity=recent.lexical_diversity,
            repetition=recent.repetition,
            stop=self._stop,
        )

    def sheet(self) -> list[Example]:
        """A random sample of what was captioned so far."""
        return self._sheet.items


class _Metrics:
    """Ray's metrics; where Ray exports none, they cost nothing."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter as RayCounter
        from ray.util.metrics import Gauge

        def gauge(name: str, about: str) -> Any:
            return Gauge(f"captune_caption_{name}", about)

        self._images = RayCounter(
            "captune_caption_images_total", "Rows through the model's stage, failed ones among them"
        )
        self._failed = RayCounter("captune_caption_failed_total", "Rows that failed", ("kind",))
        self._gauges = {
            "images_per_second": gauge("images_per_second", "Rows per second over the last half minute"),
            "error_share": gauge("error_share", "Share of recent rows that failed"),
            "mean_words": gauge("mean_words", "Words per recent caption"),
            "lexical_diversity": gauge("lexical_diversity", "Unique words / words of recent captions"),
            "repetition": gauge("repetition", "Share of two-word sequences that recent captions say more than once"),
        }
        self._remaining = gauge("remaining_images", "Rows still to do")

    def update(self, rows: int, kinds: Counter[str], live: Live, remaining: int) -> None:
        if rows:
            self._images.inc(rows)
        for kind, count in kinds.items():
            self._failed.inc(count, {"kind": kind})
        for name, metric in self._gauges.items():
            metric.set(getattr(live, name))
        self._remaining.set(remaining)
