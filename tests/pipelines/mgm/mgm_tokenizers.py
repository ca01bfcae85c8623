"""The tiny tokenizers by the name of the template whose models have them."""

from __future__ import annotations

from tests.tiny_tokenizers import tokenizer_for

__all__ = ["tokenizer_for"]
