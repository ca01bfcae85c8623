"""The next token of each row of a batch, by its own request's rules.

Shape suffixes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor, StoppingCriteria

from serve.writing import Logprobs, Writer

if TYPE_CHECKING:
    from serve.engine import Request


@dataclass
class Row:
    """One request of a batch that is being generated. `wanted` turns false when nobody waits for it any more."""

    request: Request
    writer: Writer
    wanted: Callable[[], bool] = lambda: True
    logprobs: Logprobs | None = None
    """Of the token that is about to be pushed."""


class Draw(LogitsProcessor):
    """Shapes each row's logits by its request, so that their maximum is the token to take.

    Adding Gumbel noise to logits / temperature makes the maximum a sample of the softmax. Every request has its own
    generator, so that its answer does not depend on which requests share its batch.
    """

    def __init__(self, rows: Sequence[Row], prompt_length: int, device: torch.device) -> None:
        self.rows = [(index, row, _generator(row.request)) for index, row in enumerate(rows) if _shaped(row.request)]
        self.prompt_length = prompt_length
        self.device = device

    def __call__(self, input_ids: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) of the next tokens, shaped in place."""
        for index, row, generator in self.rows:
            if row.writer.done:
                continue
            request, own_V = row.request, scores_BV[index].double()
            shaped_V = _penalized(own_V, input_ids[index, self.prompt_length :], request)
            if request.temperature > 0:
                shaped_V = _cut(shaped_V / request.temperature, request) + self._gumbel(generator, len(own_V))
            scores_BV[index] = shaped_V.to(scores_BV.dtype)
            if request.top_logprobs is not None:
                row.logprobs = _logprobs(own_V, int(scores_BV[index].argmax()), request.top_logprobs)
        return scores_BV

    def _gumbel(self, generator: torch.Generator, size: int) -> torch.Tensor:
        # On the CPU, so that a seed means the same on every device.
        uniform_V = torch.rand(size, generator=generator, dtype=torch.float64)
        return -torch.log(-torch.log(uniform_V.clamp(1e-20, 1 - 1e-16))).to(self.device)


class Follow(StoppingCriteria):
    """Hands each row its newest token; a row ends by its own rules, so that short answers do not wait for long ones."""

    def __init__(self, rows: Sequence[Row], device: torch.device) -> None:
        self.rows, self.device = rows, device

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Which rows have ended, (B,) bool."""
        newest = input_ids[:, -1].tolist()
        ended = [
            row.writer.push(token, row.logprobs) or not row.wanted()
            for row, token in zip(self.rows, newest, strict=True)
        ]
        return torch.tensor(ended, device=self.device)


def _generator(request: Request) -> torch.Generator:
    return torch.Generator().manual_seed(request.seed)


def _shaped(request: Request) -> bool:
    """Whether anything but the plain maximum is asked of this row."""
    penalized = request.presence_penalty or request.frequency_penalty
    return request.temperature > 0 or bool(penalized) or request.top_logprobs is not None


def _penalized(scores_V: torch.Tensor, said_T: torch.Tensor, request: Request) -> torch.Tensor:
    """As OpenAI has it: less for a token that the answer has already, and less again each time."""
    if not (request.presence_penalty or request.frequency_penalty):
        return scores_V
    counts_V = torch.bincount(said_T, minlength=len(scores_V)).to(scores_V)
    return scores_V - request.presence_penalty * (counts_V > 0) - request.frequency_penalty * counts_V


def _cut(scores_V: torch.Tensor, request: Request) -> torch.Tensor:
    """Only the `top_k` likeliest tokens, and of them only the likeliest that reach `top_p` together, may be drawn."""
    if 0 < request.top_k < len(scores_V):
        least = scores_V.topk(request.top_k).values[-1]
        scores_V = scores_V.masked_fill(scores_V < least, -torch.inf)
    if request.top_p < 1:
        ordered_V, order_V = scores_V.sort(descending=True)
        likelihood_V = ordered_V.softmax(dim=-1)
        beyond_V = likelihood_V.cumsum(dim=-1) - likelihood_V >= request.top_p  # never the first
        scores_V = scores_V.masked_fill(torch.zeros_like(beyond_V).scatter(0, order_V, beyond_V), -torch.inf)
    return scores_V


def _logprobs(scores_V: torch.Tensor, chosen: int, top: int) -> Logprobs:
    """Of the model's own distribution: before penalties, temperature, `top_k` and `top_p`."""
    logprobs_V = scores_V.log_softmax(dim=-1)
    likeliest = logprobs_V.topk(top)
    pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    return Logprobs(float(logprobs_V[chosen]), list(pairs))
