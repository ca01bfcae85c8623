"""Which token comes next: greedily, or by nucleus sampling whose chance belongs to the sample and not to the batch.

A caption's random numbers are drawn before its first token, from a counter-based generator (Philox, Salmon et al. 2011) keyed by
seed, sample id and candidate number. So a sample's captions do not depend on its neighbours, on when it was admitted, on how many
workers there are or on where a run was resumed. What remains is arithmetic: another batch shape moves logits in their last bits,
and a pick changes when a random number falls within that of a boundary. In float32 that is one pick in about a million; in bfloat16 and
float16, whose logits have 8 and 11 bits, it can happen in a caption, for sampling as for greedy decoding.

Shape legend: B rows, V vocabulary, T new tokens.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from pipelines.caption.config import DecodingConfig


def uniforms(seed: int, sample_id: str, candidate: int, count: int) -> np.ndarray:
    """float32 (count,) in [0, 1): the random numbers of one caption."""
    key = hashlib.blake2b(f"{seed}\0{candidate}\0{sample_id}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(count, dtype=np.float32)


def pick(logits_BV: Tensor, uniform_B: Tensor, config: DecodingConfig) -> Tensor:
    """Next token of every row (B,); the uniforms are unused when decoding is greedy."""
    if config.method != "sample":
        return logits_BV.argmax(dim=-1)
    probabilities_BV = nucleus(logits_BV, config.temperature, config.top_k, config.top_p)
    # In the vocabulary's order, not in that of probability: two tokens that change places there change no pick. In float64, so that
    # the sum never wavers over tokens that were cut off and no pick lands on one.
    cumulative_BV = probabilities_BV.cumsum(dim=-1, dtype=torch.float64)
    target_B1 = cumulative_BV[:, -1:] * uniform_B[:, None]
    return (cumulative_BV <= target_B1).sum(dim=-1)


def nucleus(logits_BV: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Probabilities (B, V) after temperature, then top-k, then top-p, as transformers' logits warpers in that order; 0 where cut off."""
    probabilities_BV = torch.softmax(logits_BV / temperature, dim=-1)
    if top_k == 0 and top_p == 1:
        return probabilities_BV
    ordered_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True)
    if top_k:
        least_B1 = ordered_BV[:, min(top_k, ordered_BV.shape[1]) - 1].unsqueeze(1)
        ordered_BV = ordered_BV * (ordered_BV >= least_B1)
        ordered_BV = ordered_BV / ordered_BV.sum(dim=-1, keepdim=True)
    likelier_BV = ordered_BV.cumsum(dim=-1) - ordered_BV
    ordered_BV = ordered_BV * (likelier_BV < top_p)
    return torch.zeros_like(ordered_BV).scatter_(1, order_BV, ordered_BV)
