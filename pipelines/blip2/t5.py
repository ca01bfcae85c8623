"""T5 (FLAN-T5), BLIP-2's encoder-decoder language model, over rows that come and go: static caches, a position per row.

Weights, norms and feed-forward blocks are those of transformers; see `opt.py` for the shape of the thing. Prefixes go
through T5's encoder once per image; a slot keeps each layer's keys and values of it.

Shape legend: B images, N prefix, G admitted rows, R rows of a step, S slots, L cache length, E encoder length, H heads,
D head size, d hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.blip2.opt import fuse
from pipelines.blip2.slots import round_up


class T5Decoder:
    """A T5 language model as `slots.Slots` drives it.

    Args:
        model: `T5ForConditionalGeneration`.
    """

    max_length: int | None = None  # relative positions
    own_length = False

    def __init__(self, model: Any) -> None:
        self._model, self._blocks = model, model.decoder.block
        self._heads, self._size = model.config.num_heads, model.config.d_kv
        attentions = [(block.layer[0].SelfAttention, block.layer[1].EncDecAttention) for block in self._blocks]
        self._fused = [fuse([own.q, own.k, own.v])[0] for own, _ in attentions]
        self._cross_fused = [fuse([reading.k, reading.v])[0] for _, reading in attentions]
        self.start_token: int | None = int(model.config.decoder_start_token_id)  # the whole prompt is the encoder's
        self.cache: Tensor | None = None
        self.cross: Tensor | None = None

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (...) -> embeddings (..., d)."""
        return self._model.shared(ids)

    def allocate(self, slots: int, prefix: int, new: int) -> None:
        """Empty caches (layers, S, L or E, 2, H, D) for rows of up to `prefix` and `new` tokens, and the table of
        position biases.
        """
        weight, length = self._fused[0], round_up(new)
        shape = (len(self._blocks), slots, length, 2, self._heads, self._size)
        self.cache = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.cross = self.cache.new_zeros((*shape[:2], round_up(prefix), *shape[3:]))
        # added to attention scores: -inf where a prefix has ended. An empty slot reads zeros: with nothing to read its
        # softmax would be NaN, which no mask takes out of the cache again
        self._unread_SE = self.cache.new_zeros(self.cross.shape[1:3])
        self._rows = torch.arange(slots, device=weight.device)
        bias_HLL = self._blocks[0].layer[0].SelfAttention.compute_bias(length, length)[0]
        later = torch.ones(length, length, dtype=torch.bool, device=weight.device).triu(1)
        self._bias_LHL = bias_HLL.masked_fill(later, float("-inf")).transpose(0, 1).contiguous()

    def admit(self, embeds_BNd: Tensor, lengths: list[int], source_G: Tensor, slots_G: Tensor) -> None:
        """Encode prefixes and fill slots with their keys and values; row g has image `source_G[g]`."""
        assert self.cross is not None
        batch, length = embeds_BNd.shape[:2]
        lengths_B1 = torch.tensor(lengths, device=embeds_BNd.device)[:, None]
        mask_BN = torch.arange(length, device=embeds_BNd.device) < lengths_B1
        hidden = self._model.encoder(inputs_embeds=embeds_BNd, attention_mask=mask_BN.long()).last_hidden_state
        for fused, cross in zip(self._cross_fused, self.cross, strict=True):
            cross[slots_G, :length] = F.linear(hidden, fused).view(batch, length, 2, self._heads, -1)[source_G]
        readable_BE = F.pad(mask_BN, (0, self._unread_SE.shape[1] - length))
        self._unread_SE[slots_G] = self._unread_SE.new_zeros(readable_BE.shape).masked_fill(
            ~readable_BE, float("-inf")
        )[source_G]

    def step(self, tokens_R: Tensor, positions_R: Tensor, length: int) -> Tensor:
        """One token of the first R slots, at its position -> logits (R, V); `length` columns of the cache are in
        use.
        """
        assert self.cache is not None and self.cross is not None
        rows = len(tokens_R)
        bias = self._bias_LHL[positions_R][:, :, None, :length]
        unread = self._unread_SE[:rows, None, None]
        x = self.embed(tokens_R)
        for block, fused, cache, cross in zip(self._blocks, self._fused, self.cache, self.cross, strict=True):
            attention, reading = block.layer[0], block.layer[1]
            qkv = F.linear(attention.layer_norm(x), fused).view(rows, 3, self._heads, -1)
            cache[self._rows[:rows], positions_R] = qkv[:, 1:]
            x = _bounded(x + attention.SelfAttention.o(_attend(qkv[:, 0], cache[:rows, :length], bias)))
            q = reading.EncDecAttention.q(reading.layer_norm(x)).view(rows, self._heads, -1)
            x = _bounded(x + reading.EncDecAttention.o(_attend(q, cross[:rows], unread)))
            x = _bounded(block.layer[-1](x))
        x = self._model.decoder.final_layer_norm(x)
        if self._model.config.scale_decoder_outputs:
            x = x * self._model.model_dim**-0.5
        return self._model.lm_head(x)

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy whole slots."""
        assert self.cache is not None and self.cross is not None
        self.cache[:, target] = self.cache[:, source]
        self.cross[:, target] = self.cross[:, source]
        self._unread_SE[target] = self._unread_SE[source]

    def release(self) -> None:
        """Give the cache's memory back."""
        self.cache = self.cross = None


def _attend(q_RHD: Tensor, cache_RL2HD: Tensor, mask: Tensor) -> Tensor:
    k, v = cache_RL2HD.permute(2, 0, 3, 1, 4).unbind()
    return F.scaled_dot_product_attention(q_RHD[:, :, None], k, v, attn_mask=mask, scale=1.0).flatten(1)


def _bounded(x: Tensor) -> Tensor:
    """T5 overflows float16 in places and lives on when clamped, as transformers does it too."""
    if x.dtype != torch.float16:
        return x
    limit = torch.finfo(torch.float16).max - 1000
    return x.clamp(-limit, limit)
