"""Prefix tuning (Li and Liang 2021, arXiv:2101.00190): learned keys and values before every conversation, as PEFT's
`PrefixEncoder` holds them.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from pipelines.errors import UserError


class PrefixLayer(CacheLayerMixin):
    """A layer's prefix as a cache that nothing is ever added to.

    That makes it safe to recompute a layer in the backward pass: a second `update` finds what the first one found,
    which PEFT's own cache does not promise, and why PEFT refuses gradient checkpointing here.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """It was given what it holds."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The prefix with a call's own keys and values behind it, (batch, heads, length, head_dim) each."""
        assert self.keys is not None and self.values is not None
        keys, values = self.keys.to(key_states.dtype), self.values.to(value_states.dtype)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def get_seq_length(self) -> int:
        """Tokens of the prefix; also where the positions of a conversation begin."""
        assert self.keys is not None
        return int(self.keys.shape[-2])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys that a query of this length may see, 0)."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """There is none."""
        return -1


def add_prefix(model: Any, config: Any) -> None:
    """Put PEFT's prefix encoder into the model as `prompt_encoder`, in place.

    Args:
        config: a `PrefixTuningConfig`; how wide its keys and values are is entered here.

    Raises:
        UserError: this version of transformers cannot recompute a layer that reads a cache.
    """
    from peft.tuners.prefix_tuning import PrefixEncoder

    text = model.config.text_config
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    config.num_layers, config.num_attention_heads = text.num_hidden_layers, heads
    config.token_dim, config.num_transformer_submodules = heads * head_dim, 1
    model.prompt_encoder = PrefixEncoder(config)
    for layer in model.model.language_model.layers:
        if not hasattr(layer, "_can_checkpoint_with_cache"):
            raise UserError("train.method prefix needs transformers 5.20 or newer")
        layer._can_checkpoint_with_cache = True  # `PrefixLayer` may be read twice


def prefix_cache(encoder: torch.nn.Module, config: Any, rows: int) -> Cache:
    """The prefix of a batch of so many rows, as PEFT's `get_prompt` lays it out."""
    heads, tokens = config.num_attention_heads, config.num_virtual_tokens
    states = encoder.embedding.weight.view(tokens, config.num_layers, 2, heads, config.token_dim // heads)  # type: ignore[union-attr, operator]
    states = states.permute(1, 2, 3, 0, 4).unsqueeze(2).expand(-1, -1, rows, -1, -1, -1)
    return Cache(layers=[PrefixLayer(keys, values) for keys, values in states])
