"""Which token comes next: greedily, or by nucleus sampling whose chance belongs to the sample and not to the batch.

A caption's random numbers are drawn before its first token, from a counter-based generator (Philox, Salmon et al. 2011)
keyed by seed, sample id and candidate number. So a sample's captions do not depend on its neighbours, on when it was
admitted, on how many workers there are or on where a run was resumed. What remains is arithmetic: another batch shape
moves logits in their last bits, and a pick changes when a random number falls within that of a boundary. In float32
that is one pick in about a million; in bfloat16 and float16, whose logits have 8 and 11 bits, it can happen in a
caption, for sampling as for greedy decoding.

Shape legend: B rows, V vocabulary, K tokens among which one is picked.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from pipelines.blip2.config import DecodingConfig

_SORTED_AT_MOST = (
    4096  # a real vocabulary has fifty thousand tokens, and sorting it takes longer than the model's own step
)


def uniforms(seed: int, sample_id: str, candidate: int, count: int) -> np.ndarray:
    """float32 (count,) in [0, 1): the random numbers of one caption."""
    key = hashlib.blake2b(f"{seed}\0{candidate}\0{sample_id}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(count, dtype=np.float32)


def pick(logits_BV: Tensor, uniform_B: Tensor, config: DecodingConfig) -> Tensor:
    """Next token of every row (B,); the uniforms are unused when decoding is greedy."""
    if config.method != "sample":
        return logits_BV.argmax(dim=-1)
    probabilities_BK, tokens_BK = choices(logits_BV, config)
    # In the vocabulary's order, not in that of probability: two tokens that change places there change no pick. In
    # float64, so that the sum never wavers over tokens that were cut off and no pick lands on one.
    cumulative_BK = probabilities_BK.cumsum(dim=-1, dtype=torch.float64)
    target_B1 = cumulative_BK[:, -1:] * uniform_B[:, None]
    place_B1 = (cumulative_BK <= target_B1).sum(dim=-1, keepdim=True)
    return (place_B1 if tokens_BK is None else tokens_BK.gather(1, place_B1))[:, 0]


def choices(logits_BV: Tensor, config: DecodingConfig) -> tuple[Tensor, Tensor | None]:
    """Tokens that temperature, then top-k, then top-p leave, as transformers' logits warpers in that order.

    Returns:
        Their probabilities, 0 where top-p cuts (they are not scaled up again), and which tokens they are, in the
        vocabulary's order (None: all). K is `top_k` where that is set.
    """
    logits_BK, tokens_BK = logits_BV, None
    if 0 < config.top_k < logits_BV.shape[-1]:
        logits_BK, tokens_BK = logits_BV.topk(config.top_k, dim=-1)
        tokens_BK, order_BK = tokens_BK.sort(dim=-1)
        logits_BK = logits_BK.gather(1, order_BK)
    probabilities_BK = torch.softmax(logits_BK / config.temperature, dim=-1)
    if config.top_p < 1:
        probabilities_BK = probabilities_BK * (probabilities_BK >= _least(probabilities_BK, config.top_p))
    return probabilities_BK, tokens_BK


def _least(probabilities_BK: Tensor, top_p: float) -> Tensor:
    """The least probability (B, 1) that top-p keeps: the likelier tokens have less than `top_p` together."""
    if probabilities_BK.shape[-1] > _SORTED_AT_MOST:
        return _least_by_halving(probabilities_BK, top_p)
    ordered_BK = probabilities_BK.sort(dim=-1, descending=True).values
    likelier_BK = ordered_BK.cumsum(dim=-1) - ordered_BK
    return ordered_BK.masked_fill(likelier_BK >= top_p, 2.0).amin(dim=-1, keepdim=True)


def _least_by_halving(probabilities_BK: Tensor, top_p: float) -> Tensor:
    """The same without sorting: halves the range of bit patterns, which positive floats are ordered by, until one is
    left.
    """
    low_B1 = torch.zeros_like(probabilities_BK[:, :1]).view(torch.int32)
    high_B1 = torch.ones_like(probabilities_BK[:, :1]).view(torch.int32)  # nothing is likelier than 1
    for _ in range(30):  # log2 of the pattern of 1.0
        middle_B1 = (low_B1 + high_B1) // 2
        likelier_BK = probabilities_BK > middle_B1.view(torch.float32)
        enough_B1 = (probabilities_BK * likelier_BK).sum(dim=-1, keepdim=True) < top_p
        high_B1 = torch.where(enough_B1, middle_B1, high_B1)
        low_B1 = torch.where(enough_B1, low_B1, middle_B1 + 1)
    return high_B1.view(torch.float32)
