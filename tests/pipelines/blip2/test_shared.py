"""Callers in several threads share one engine: each gets its own captions, and an error ends its call and nothing
else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import numpy as np
import pytest

from pipelines.blip2.config import DecodingConfig
from pipelines.blip2.engine import BlipCaptioner, Captioned, Request
from pipelines.blip2.shared import SharedEngine
from pipelines.caption.config import CaptionConfig
from pipelines.errors import WorkFailed


def test_each_caller_gets_its_own_captions(blip2: Path) -> None:
    """Twelve calls of different lengths from four threads, sampled: what the engine says of the same images in one go,
    in each caller's order.
    """
    config = CaptionConfig(batch_size=4, max_new_tokens=8, decoding=DecodingConfig(method="sample"))
    engine = BlipCaptioner(blip2, config)
    noise = np.random.default_rng(7).integers(0, 256, (66, 3, 32, 32), dtype=np.uint8)
    requests = [Request(pixels, f"id{row}") for row, pixels in enumerate(noise)]
    found = dict(engine.captions(requests))
    expected = [found[row] for row in range(len(requests))]
    assert len({said.chosen for said in expected}) > 20

    ends = np.cumsum(range(12))
    shared = SharedEngine(engine)
    with ThreadPoolExecutor(4) as callers:
        answers = callers.map(shared.submit, [requests[end - size : end] for size, end in enumerate(ends)], range(12))
    assert [said for answer in answers for said in answer.result()] == expected


def test_an_error_reaches_its_callers_and_the_next_call_is_served() -> None:
    """A caller waiting for an engine that broke would wait for ever."""

    class Fragile:
        def captions(self, requests: Iterable[Request | None]) -> Iterator[tuple[int, Captioned]]:
            for row, request in enumerate(requests):
                if request is None:
                    return
                if request.sample_id == "poison":
                    raise WorkFailed("out of memory with a single image at once")
                yield row, Captioned([], None, request.sample_id)

    shared = SharedEngine(Fragile())  # type: ignore[arg-type]
    pixels = np.zeros((3, 2, 2), np.uint8)
    with pytest.raises(WorkFailed, match="single image"):
        shared.submit([Request(pixels, "fine"), Request(pixels, "poison"), Request(pixels, "behind it")], 0).result(10)
    assert [said.chosen for said in shared.submit([Request(pixels, "later")], 1).result(10)] == ["later"]
    assert shared.submit([], 2).result(10) == []


def test_earlier_tickets_go_first() -> None:
    """A file's later images overtake those of files begun after it, or several files would all end, and be committed,
    late.
    """
    seen: list[str | None] = []
    begin = Event()

    class Slow:
        def captions(self, requests: Iterable[Request | None]) -> Iterator[tuple[int, Captioned]]:
            begin.wait(10)
            for row, request in enumerate(requests):
                if request is None:
                    return
                seen.append(request.sample_id)
                yield row, Captioned([], None, request.sample_id)

    shared = SharedEngine(Slow())  # type: ignore[arg-type]
    pixels = np.zeros((3, 2, 2), np.uint8)
    first, second = shared.ticket(), shared.ticket()
    coming = [shared.submit([Request(pixels, "first file")], first)]
    coming += [shared.submit([Request(pixels, f"second file {n}")], second) for n in range(2)]
    coming += [shared.submit([Request(pixels, f"first file {n}")], first) for n in range(2)]
    begin.set()
    assert all(answer.result(10) for answer in coming)
    assert seen == ["first file", "first file 0", "first file 1", "second file 0", "second file 1"]
