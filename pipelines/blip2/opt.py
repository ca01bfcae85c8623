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

from pipelines.blip2.ops import Product, Rows, add_norm, has_kernels, quantize
from pipelines.blip2.slots import round_up


class OptDecoder:
    """An OPT language model as `slots.Slots` drives it.

    Args:
        model: `OPTForCausalLM`; its query, key and value weights become views of fused ones.
        fp8: the layers' products in float8.
    """

    start_token: int | None = (
        None  # the prompt's last token goes in with the first step, whose logits are the first new token's
    )

    def __init__(self, model: Any, fp8: bool = False) -> None:
        decoder = model.model.decoder
        assert decoder.project_in is None, "image features have the hidden size, so the embeddings must have it too"
        self._decoder, self._head, self._fp8 = decoder, model.lm_head, fp8
        self._heads = model.config.num_attention_heads
        self._scale = (model.config.hidden_size // self._heads) ** -0.5
        before = decoder.layers[0].do_layer_norm_before
        # the norm behind a layer's feed-forward block: the next layer's first, where norms come before
        firsts = [layer.self_attn_layer_norm for layer in decoder.layers]
        behind = [*firsts[1:], decoder.final_layer_norm] if before else [x.final_layer_norm for x in decoder.layers]
        last = decoder.layers[-1]
        self._layers = [
            _Layer(layer, norm, fp8, feeds_fp8=fp8 and layer is not last)
            for layer, norm in zip(decoder.layers, behind, strict=True)
        ]
        self._first = firsts[0] if before else None
        self.own_length = has_kernels(model.lm_head.weight)
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
        h = self._start(x)
        for layer, cache in zip(self._layers, self.cache, strict=True):
            qkv = layer.qkv(h).view(batch, length, 3, self._heads, -1)
            if has_kernels(qkv):
                from pipelines.blip2 import kernels

                kernels.store_prefix(qkv, cache, source_G, slots_G)
            else:
                cache[slots_G, :length] = qkv[source_G, :, 1:]
            if layer is self._layers[-1]:
                return  # its keys and values are all that a prefix leaves behind
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self._scale)
            x, h = layer.finish(x, attended.transpose(1, 2).reshape(batch, length, -1))

    def step(self, tokens_R: Tensor, positions_R: Tensor, length: int) -> Tensor:
        """One token of the first R slots, at its position -> logits (R, V); `length` columns of the cache are in
        use.
        """
        assert self.cache is not None
        positions = self._decoder.embed_positions
        x = self.embed(tokens_R) + F.embedding(positions_R + positions.offset, positions.weight)
        h = self._start(x)
        mask_R11L = None if has_kernels(x) else self._mask(positions_R, length)
        for layer, cache in zip(self._layers, self.cache, strict=True):
            qkv = layer.qkv(h).view(len(tokens_R), 3, self._heads, -1)
            x, h = layer.finish(x, self._attend(qkv, cache, positions_R, mask_R11L, length))
        return self._head(h)

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy whole slots."""
        assert self.cache is not None
        self.cache[:, target] = self.cache[:, source]

    def release(self) -> None:
        """Give the cache's memory back."""
        self.cache = None

    def _start(self, x: Tensor) -> Tensor | Rows:
        """What the first layer reads."""
        h = x if self._first is None else self._first(x)
        return quantize(h) if self._fp8 else h

    def _mask(self, positions_R: Tensor, length: int) -> Tensor:
        seen_RL = self._columns[:length] <= positions_R[:, None]
        return self._hidden.expand(len(seen_RL), length).masked_fill(seen_RL, 0.0)[:, None, None]

    def _attend(
        self, qkv_R3HD: Tensor, cache_SL2HD: Tensor, positions_R: Tensor, mask_R11L: Tensor | None, length: int
    ) -> Tensor:
        """Each row's query against what its slot holds, the row's own key and value among it: (R, d)."""
        if mask_R11L is None:
            from pipelines.blip2 import kernels

            return kernels.attend_step(qkv_R3HD, cache_SL2HD, positions_R, self._scale)
        rows = len(qkv_R3HD)
        cache_SL2HD[self._rows[:rows], positions_R] = qkv_R3HD[:, 1:]
        k, v = cache_SL2HD[:rows, :length].permute(2, 0, 3, 1, 4).unbind()
        q = qkv_R3HD[:, 0, :, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_R11L, scale=self._scale).reshape(rows, -1)


class _Layer:
    """A decoder layer's products, and its residuals and norms in the order of small OPTs (norm before) or of OPT-350M
    (norm after).

    Args:
        layer: transformers' `OPTDecoderLayer`.
        behind: the norm that follows the feed-forward block; None where nothing does.
        fp8: products in float8.
        feeds_fp8: so is the one that reads the layer's result.
    """

    def __init__(self, layer: Any, behind: Any, fp8: bool, feeds_fp8: bool) -> None:
        own = layer.self_attn
        self.qkv = Product(*fuse([own.q_proj, own.k_proj, own.v_proj]), fp8)
        self._out, self._fc1, self._fc2 = (Product.of(each, fp8) for each in (own.out_proj, layer.fc1, layer.fc2))
        self._before, self._activation = layer.do_layer_norm_before, layer.activation_fn
        self._behind, self._fp8, self._feeds_fp8 = behind, fp8, feeds_fp8
        self._between = layer.final_layer_norm if self._before else layer.self_attn_layer_norm

    def finish(self, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor | Rows]:
        """From the attention's result to what the next layer adds to, and what it reads."""
        x, h = self._join(x, self._out(attended), self._between, self._fp8)
        inner = self._fc1.activated(h, self._activation)
        return self._join(x, self._fc2(inner), self._behind, self._feeds_fp8)

    def _join(self, x: Tensor, y: Tensor, norm: Any, fp8: bool) -> tuple[Tensor, Tensor | Rows]:
        if self._before and norm is not None:
            return add_norm(x, y, norm, fp8)
        total = x + y if norm is None else norm(x + y)
        return total, quantize(total) if fp8 else total


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
