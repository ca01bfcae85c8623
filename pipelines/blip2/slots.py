"""Continuous batching: a fixed set of slots, each decoding one caption; a finished caption leaves and the next one
takes its slot.

So a short caption never waits for the longest of its batch (Yu et al. 2022, Orca). Shapes stay fixed, which lets a GPU
replay one CUDA graph per step in place of thousands of launches; on a CPU the same code runs eagerly. While nothing is
there to admit, the rest is moved together and the step shrinks with it.

Shape legend: S slots, R slots of a step (the first R), T new tokens, Q query tokens, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipelines.blip2.config import DecodingConfig
from pipelines.blip2.sampling import pick, uniforms

_IDLE = -(2**31)
_PREFIXES = 64
_COLUMNS = 16  # step widths are multiples of this: few graphs, aligned masks


def round_up(length: int, multiple: int = _COLUMNS) -> int:
    """Next multiple."""
    return -(-length // multiple) * multiple


@dataclass(frozen=True)
class Prefix:
    """What a caption continues: one per image, shared by its candidates.

    Attributes:
        row: index of the image.
        sample_id: seeds sampling.
        features_Qd: the image, as the language model reads it.
        prompt: token ids after the image.
        limit: most new tokens.
    """

    row: int
    sample_id: str
    features_Qd: Tensor
    prompt: list[int]
    limit: int

    @property
    def length(self) -> int:
        """Tokens, the image's among them."""
        return len(self.features_Qd) + len(self.prompt)


@dataclass(frozen=True)
class Job:
    """One caption to make: a prefix and which of its candidates this is."""

    prefix: Prefix
    candidate: int


class Decoder(Protocol):
    """A language model with a cache per slot; `opt.py` and `t5.py` are the two.

    Attributes:
        start_token: what the first step is fed; None where that is the prompt's last token.
        max_length: most positions of a caption and its prefix; None where there is no limit.
        own_length: every row of a step reads as far as it reaches, whatever `length` says.
    """

    start_token: int | None
    max_length: int | None
    own_length: bool

    def embed(self, ids: Tensor) -> Tensor: ...  # noqa: D102
    def allocate(self, slots: int, prefix: int, new: int) -> None: ...  # noqa: D102
    def admit(self, embeds_BNd: Tensor, lengths: list[int], source_G: Tensor, slots_G: Tensor) -> None: ...  # noqa: D102
    def step(self, tokens_R: Tensor, positions_R: Tensor, length: int) -> Tensor: ...  # noqa: D102
    def move(self, source: Tensor, target: Tensor) -> None: ...  # noqa: D102
    def release(self) -> None: ...  # noqa: D102


class Slots:
    """Slots over one decoder.

    Args:
        decoder: its cache is allocated here.
        count: S.
        prefix: longest prefix.
        new: T, most new tokens of any caption.
        decoding: how tokens are picked.
        ends: token ids that end a caption.
        device: torch device.
    """

    def __init__(
        self, decoder: Decoder, count: int, prefix: int, new: int, decoding: DecodingConfig, ends: list[int],
        device: torch.device
    ) -> None:  # fmt: skip
        self.count, self.prefix, self.new = count, prefix, new
        self._decoder, self._decoding, self._device = decoder, decoding, device
        decoder.allocate(count, prefix, new)
        long: dict[str, Any] = {"dtype": torch.long, "device": device}
        self._ends = torch.tensor(ends, **long)
        self._tokens, self._positions, self._made = (torch.zeros(count, **long) for _ in range(3))
        self._limits = torch.ones(count, **long)
        self._done = torch.ones(count, dtype=torch.bool, device=device)
        self._history = torch.zeros(count, new + 1, **long)
        self._uniforms = torch.zeros(count, new + 1, device=device)
        end = new + (prefix if decoder.start_token is None else 0)
        self._last_position = min(end, decoder.max_length or end) - 1
        # on a GPU, prefixes of fewer rows than this cost the time of their launches
        self._granule = max(1, count // 8, min(_PREFIXES, count // 2) if device.type == "cuda" else 0)
        self._jobs: list[Job | None] = [None] * count
        # the host's own copy of positions, to know how much of the cache is in use
        self._reached = np.full(count, _IDLE)
        self._step = _Graphs(self._advance, device) if device.type == "cuda" else self._advance
        self._outcome = _Outcome(self._done, self._made, self._history)

    def run(
        self, jobs: Iterable[Job | None], meanwhile: Callable[[], None] | None = None
    ) -> Iterator[tuple[Job, list[int]]]:
        """Decode every job; each comes back as it ends, with its tokens (the end token among them, if it came to one).

        None among the jobs says that there is none at the moment: the others go on, and jobs are asked for again while
        any does. `meanwhile` is called whenever a step has been launched: what it launches keeps a GPU busy, and so do
        captions that are handed on only once it has work again.
        """
        self._jobs = [None] * self.count
        self._reached[:] = _IDLE
        waiting, more = iter(jobs), True
        ended: list[tuple[Job, list[int]]] = []
        while True:
            free = np.flatnonzero(self._reached < 0)
            if len(free) >= self._granule:
                new, more = self._next(waiting, len(free)) if more else ([], False)
                if new:
                    self._admit(new, free[: len(new)])
                if len(new) < len(free):
                    self._compact()
            rows = int(np.flatnonzero(self._reached >= 0).max(initial=-1)) + 1
            if rows:
                length = self._last_position if self._decoder.own_length else int(self._reached.max())
                self._step(min(round_up(rows, self._granule), self.count), round_up(length + 1))
                self._outcome.fetch()
                self._reached += self._reached >= 0
                if meanwhile is not None:
                    meanwhile()
            yield from ended
            if not rows:
                return
            ended = self._finished(rows)

    @staticmethod
    def _next(jobs: Iterator[Job | None], most: int) -> tuple[list[Job], bool]:
        """As many jobs as there are at the moment, and whether more may come."""
        new: list[Job] = []
        while len(new) < most:
            try:
                job = next(jobs)
            except StopIteration:
                return new, False
            if job is None:
                break
            new.append(job)
        return new, True

    def _admit(self, jobs: list[Job], slots: np.ndarray) -> None:
        prefixes = list({job.prefix.row: job.prefix for job in jobs}.values())
        place = {prefix.row: index for index, prefix in enumerate(prefixes)}
        source_G = self._tensor([place[job.prefix.row] for job in jobs])
        slots_G = self._tensor(slots)
        start = self._decoder.start_token
        kept = [prefix.prompt[:-1] if start is None else prefix.prompt for prefix in prefixes]
        lengths = [len(prefix.features_Qd) + len(ids) for prefix, ids in zip(prefixes, kept, strict=True)]
        self._decoder.admit(self._embeds(prefixes, kept), lengths, source_G, slots_G)

        for job, slot in zip(jobs, slots, strict=True):
            self._jobs[slot] = job
            self._reached[slot] = job.prefix.length - 1 if start is None else 0
        self._tokens[slots_G] = self._tensor([job.prefix.prompt[-1] if start is None else start for job in jobs])
        self._positions[slots_G] = self._tensor(self._reached[slots])
        self._made[slots_G] = 0
        self._limits[slots_G] = self._tensor([job.prefix.limit for job in jobs])
        if self._decoding.method == "sample":
            draws = [uniforms(self._decoding.seed, job.prefix.sample_id, job.candidate, self.new + 1) for job in jobs]
            self._uniforms[slots_G] = torch.from_numpy(np.stack(draws)).to(self._device)

    def _embeds(self, prefixes: list[Prefix], prompts: list[list[int]]) -> Tensor:
        """Image features, then the prompt's embeddings, then zeros up to the longest: (B, N, d)."""
        features_BQd = torch.stack([prefix.features_Qd for prefix in prefixes])
        longest = max(len(ids) for ids in prompts)
        if not longest:
            return features_BQd
        ids_BP = self._tensor([ids + [0] * (longest - len(ids)) for ids in prompts])
        return torch.cat([features_BQd, self._decoder.embed(ids_BP).to(features_BQd.dtype)], dim=1)

    def _advance(self, rows: int, length: int) -> None:
        """One token for the first `rows` slots, on static buffers only: a CUDA graph can be made of it."""
        tokens, positions, made = self._tokens[:rows], self._positions[:rows], self._made[:rows]
        logits_RV = self._decoder.step(tokens, positions, length).float()
        if self._decoding.min_new_tokens:
            early = (made < self._decoding.min_new_tokens)[:, None]
            logits_RV[:, self._ends] = logits_RV[:, self._ends].masked_fill(early, float("-inf"))
        uniform_R = self._uniforms[:rows].gather(1, made[:, None])[:, 0]
        tokens.copy_(pick(logits_RV, uniform_R, self._decoding))
        self._history[:rows].scatter_(1, made[:, None], tokens[:, None])
        made.add_(1)
        self._done[:rows] = (tokens[:, None] == self._ends).any(dim=1) | (made >= self._limits[:rows])
        # idle slots go on with nobody reading them; they must stay inside the buffers
        made.clamp_(max=self.new)
        positions.add_(1).clamp_(max=self._last_position)

    def _finished(self, rows: int) -> list[tuple[Job, list[int]]]:
        """What the last step ended; its slots are free."""
        done, made, history = self._outcome.read()
        ended = []
        for slot in np.flatnonzero(done[:rows] & (self._reached[:rows] >= 0)):
            job, self._jobs[slot], self._reached[slot] = self._jobs[slot], None, _IDLE
            assert job is not None
            ended.append((job, history[slot, : made[slot]].tolist()))
        return ended

    def _compact(self) -> None:
        """Move the last rows into holes when that makes a step smaller."""
        active = np.flatnonzero(self._reached >= 0)
        if not len(active) or active[-1] + 1 - len(active) < self._granule:
            return
        source = active[active >= len(active)]
        target = np.setdiff1d(np.arange(len(active)), active)
        source_M, target_M = self._tensor(source), self._tensor(target)
        self._decoder.move(source_M, target_M)
        for state in (self._tokens, self._positions, self._made, self._limits, self._history, self._uniforms):
            state[target_M] = state[source_M]
        for old, new in zip(source, target, strict=True):
            self._jobs[new], self._jobs[old] = self._jobs[old], None
        self._reached[target], self._reached[source] = self._reached[source], _IDLE

    def _tensor(self, values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.long).to(self._device)


class _Outcome:
    """What a step came to, for the host: fetched behind it, so that reading waits for nothing launched later."""

    def __init__(self, *states: Tensor) -> None:
        self._states, cuda = states, states[0].is_cuda
        self._event = torch.cuda.Event() if cuda else None
        self._copies = [torch.empty(state.shape, dtype=state.dtype, pin_memory=cuda) for state in states]

    def fetch(self) -> None:
        for copy, state in zip(self._copies, self._states, strict=True):
            copy.copy_(state, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def read(self) -> list[np.ndarray]:
        if self._event is not None:
            self._event.synchronize()
        return [copy.numpy() for copy in self._copies]


class _Graphs:
    """A step per shape: eager the first time, which warms libraries up, captured the second, replayed from then on."""

    def __init__(self, advance: Callable[[int, int], None], device: torch.device) -> None:
        self._advance = advance
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._seen: set[tuple[int, int]] = set()
        self._device, self._stream, self._pool = device, torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def __call__(self, rows: int, length: int) -> None:
        key = (rows, length)
        with torch.cuda.device(self._device):
            if key in self._graphs:
                self._graphs[key].replay()
            elif key in self._seen:
                self._graphs[key] = self._capture(rows, length)
                self._graphs[key].replay()  # capturing did not run it
            else:
                self._seen.add(key)
                self._advance(rows, length)

    def _capture(self, rows: int, length: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # not by `torch.cuda.graph`, which collects garbage and empties the allocator every time; thread_local: what
        # other threads do with the device, such as pinning memory, does not break this capture
        with torch.cuda.stream(self._stream):
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                self._advance(rows, length)
            finally:
                graph.capture_end()
        return graph
