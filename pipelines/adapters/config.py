"""The `merge` section of a recipe."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pipelines.errors import UserError


@dataclass
class MergeConfig:
    """How an adapter becomes part of its model.

    Attributes:
        dtype: of the written weights: `auto` (the base model's), float32, bfloat16 or float16.
        any_base: merge into a model other than the one that the adapter was trained on, e.g. one whose tokenizer files
            were edited since.
        tolerance: largest absolute difference of logits, in float32, between base + adapter and the merged model.
        remote_code: put the modelling code into the directory, so that transformers loads it without captune
            (trust_remote_code=True). A base that has it passes it on in any case.
    """

    dtype: str = "auto"
    any_base: bool = False
    tolerance: float = 1e-3
    remote_code: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise UserError(f"merge.dtype must be auto, float32, bfloat16 or float16, not '{self.dtype}'")
        if self.tolerance <= 0:
            raise UserError("merge.tolerance must be positive")


def decides(model: str, adapter: str, config: MergeConfig) -> dict[str, Any]:
    """Everything that decides the merged model, by the identities of its parts."""
    return {"config": asdict(config), "model": model, "adapter": adapter}
