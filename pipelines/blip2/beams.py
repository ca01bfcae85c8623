"""Beam search: transformers' own, over image features that are there already.

Beams of one caption end together, so there is nothing to refill; a batch takes as long as its longest caption.

Shape legend: B images, N longest prefix, d hidden size of the language model.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from pipelines.blip2.config import DecodingConfig
from pipelines.blip2.slots import Job, Prefix


def search(
    model: Any, prefixes: list[Prefix], decoding: DecodingConfig, count: int, ends: list[int]
) -> Iterator[tuple[Job, list[int]]]:
    """The `count` best captions of every prefix, best first, as `Blip2ForConditionalGeneration.generate(num_beams=...)`
    finds them.
    """
    language_model = model.language_model
    for limit, group in groupby(sorted(prefixes, key=lambda prefix: prefix.limit), key=lambda prefix: prefix.limit):
        batch = list(group)
        left = not language_model.config.is_encoder_decoder
        embeds_BNd, mask_BN = _pad(batch, language_model.get_input_embeddings(), left)
        found = language_model.generate(
            inputs_embeds=embeds_BNd,
            attention_mask=mask_BN,
            max_new_tokens=limit,
            min_new_tokens=decoding.min_new_tokens or None,
            do_sample=False,
            num_beams=decoding.beams,
            num_return_sequences=count,
            length_penalty=decoding.length_penalty,
        )
        rows = found if left else found[:, 1:]  # an encoder-decoder's captions begin with its start token
        for index, tokens in enumerate(rows.tolist()):
            yield Job(batch[index // count], index % count), _until_end(tokens, ends)


def _pad(prefixes: list[Prefix], embedding: Any, left: bool) -> tuple[Tensor, Tensor]:
    """Prefixes (B, N, d) and their mask (B, N): a decoder goes on at the right end, so it is padded on the left."""
    rows = []
    for prefix in prefixes:
        ids = torch.tensor(prefix.prompt, device=prefix.features_Qd.device)
        rows.append(torch.cat([prefix.features_Qd, embedding(ids).to(prefix.features_Qd.dtype)]))
    masks = [torch.ones(len(row), dtype=torch.long, device=row.device) for row in rows]
    side = "left" if left else "right"
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True, padding_side=side), pad(masks, batch_first=True, padding_side=side)


def _until_end(tokens: list[int], ends: list[int]) -> list[int]:
    """Without the padding after the end token."""
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[: place + 1]
    return tokens
