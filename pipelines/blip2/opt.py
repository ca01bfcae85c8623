"""OPT, BLIP-2's decoder-only language model, over rows that come and go: one static cache, a position per row, no
padding.

Weights and layers are those of transformers; what is left out is what it does around them at every step. A row's prefix
lies at positions 0, 1, ... of its slot and its new tokens follow, so causality alone masks whatever an earlier row or a
shorter neighbour left behind.

Shape legend: B images, N prefix, G admitted rows, R rows of a step, S slots, L cache length, H heads, D head size, d
hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.blip2.slots import round_up


class OptDecoder:
    """An OPT language model as `slots.Slots` drives it.

    Args:
        model: `OPTForCausalLM`; its query, key and value weights become views of fused ones.
    """

    start_token: int | None = (
        None  # the prompt's last token goes in with the first step, whose logits are the first new token's
    )

    def __init__(self, model: Any) -> None:
        decoder = model.model.decoder
        assert decoder.project_in is None, "image features have the hidden size, so the embeddings must have it too"
        self._decoder, self._head, self._layers = decoder, model.lm_head, decoder.layers
        self._heads = model.config.num_attention_heads
        self._scale = (model.config.hidden_size // self._heads) ** -0.5
        attentions = [layer.self_attn for layer in self._layers]
        self._fused = [fuse([each.q_proj, each.k_proj, each.v_proj]) for each in attentions]
        self.max_length: int | None = int(model.config.max_position_embeddings)
        self.cache: Tensor | None = None

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (...) -> embeddings (..., d)."""
        return self._decoder.embed_tokens(ids)

    def allocate(self, slots: int, prefix: int, new: int) -> None:
        """An empty cache (layers, S, L, 2, H, D) for rows of up to `prefix` and `new` tokens."""
        weight = self._decoder.embed_tokens.weight
        length = round_up(prefix + new)
        shape = (len(self._layers), slots, length, 2, self._heads, weight.shape[1] // self._heads)
        self.cache = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self._rows = torch.arange(slots, device=weight.device)
        self._columns = torch.arange(length, device=weight.device)
        self._hidden = torch.full((1, 1), float("-inf"), dtype=weight.dtype, device=weight.device)

    def admit(self, embeds_BNd: Tensor, lengths: list[int], source_G: Tensor, slots_G: Tensor) -> None:
        """Fill slots with prefixes; row g has image `source_G[g]`. What lies beyond a shorter prefix is overwritten
        before it is seen.
        """
        assert self.cache is not None
        batch, length = embeds_BNd.shape[:2]
        positions = self._decoder.embed_positions
        x = embeds_BNd + positions.weight[positions.offset : positions.offset + length]
        for layer, fused, cache in zip(self._layers, self._fused, self.cache, strict=True):
            qkv = self._project(layer, fused, x).view(batch, length, 3, self._heads, -1)
            cache[slots_G, :length] = qkv[source_G, :, 1:]
            if layer is self._layers[-1]:
                return  # its keys and values are all that a prefix leaves behind
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self._scale)
            x = self._finish(layer, x, attended.transpose(1, 2).reshape(batch, length, -1))

    def step(self, tokens_R: Tensor, positions_R: Tensor, length: int) -> Tensor:
        """One token of the first R slots, at its position -> logits (R, V); `length` columns of the cache are in
        use.
        """
        assert self.cache is not None
        rows = len(tokens_R)
        seen_RL = self._columns[:length] <= positions_R[:, None]
        mask_R11L = self._hidden.expand(rows, length).masked_fill(seen_RL, 0.0)[:, None, None]
        positions = self._decoder.embed_positions
        x = self.embed(tokens_R) + F.embedding(positions_R + positions.offset, positions.weight)
        for layer, fused, cache in zip(self._layers, self._fused, self.cache, strict=True):
            qkv = self._project(layer, fused, x).view(rows, 3, self._heads, -1)
            cache[self._rows[:rows], positions_R] = qkv[:, 1:]
            k, v = cache[:rows, :length].permute(2, 0, 3, 1, 4).unbind()
            attended = F.scaled_dot_product_attention(qkv[:, 0, :, None], k, v, attn_mask=mask_R11L, scale=self._scale)
            x = self._finish(layer, x, attended.reshape(rows, -1))
        if self._decoder.final_layer_norm is not None:
            x = self._decoder.final_layer_norm(x)
        return self._head(x)

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy whole slots."""
        assert self.cache is not None
        self.cache[:, target] = self.cache[:, source]

    def release(self) -> None:
        """Give the cache's memory back."""
        self.cache = None

    def _project(self, layer: Any, fused: tuple[Tensor, Tensor | None], x: Tensor) -> Tensor:
        return F.linear(layer.self_attn_layer_norm(x) if layer.do_layer_norm_before else x, *fused)

    @staticmethod
    def _finish(layer: Any, x: Tensor, attended: Tensor) -> Tensor:
        """Residuals, norms and the feed-forward block, in the order of small OPTs (norm before) or of OPT-350M (norm
        after).
        """
        before = layer.do_layer_norm_before
        x = x + layer.self_attn.out_proj(attended)
        if not before:
            x = layer.self_attn_layer_norm(x)
        inner = layer.activation_fn(layer.fc1(layer.final_layer_norm(x) if before else x))
        x = x + layer.fc2(inner)
        return x if before else layer.final_layer_norm(x)


def fuse(parts: list[Any]) -> tuple[Tensor, Tensor | None]:
    """Linear layers of one shape as one weight and bias; the layers become views of it, so that nothing is held
    twice.
    """
    weight = torch.cat([part.weight.data for part in parts])
    bias = torch.cat([part.bias.data for part in parts]) if parts[0].bias is not None else None
    for part, own in zip(parts, weight.chunk(len(parts)), strict=True):
        part.weight.data = own
    for part, own in zip(parts, bias.chunk(len(parts)) if bias is not None else (), strict=bias is not None):
        part.bias.data = own
    return weight, bias
