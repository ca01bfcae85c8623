"""The `caption` section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.errors import UserError


@dataclass
class CaptionConfig:
    """How images are captioned.

    Attributes:
        model: Hugging Face directory (or hub id) of a BLIP-2 checkpoint.
        prompt: text that every caption continues; empty for none.
        batch_size: images per call of the model.
        max_new_tokens: longest caption, in tokens.
        dtype: weights and activations of the model: float32, bfloat16 or float16.
        actors: model replicas; each is one Ray actor.
        cpus_per_actor: CPUs that Ray reserves for a replica (fractions let it share a small machine with the decoders).
        gpus_per_actor: GPUs that Ray reserves for a replica; 0 runs on the CPU.
        rows_per_shard: most rows in one Parquet shard.
    """

    model: str = ""
    prompt: str = ""
    batch_size: int = 32
    max_new_tokens: int = 32
    dtype: str = "float32"
    actors: int = 1
    cpus_per_actor: float = 1.0
    gpus_per_actor: float = 0.0
    rows_per_shard: int = 10_000

    def __post_init__(self) -> None:
        for key in ("batch_size", "max_new_tokens", "actors", "rows_per_shard"):
            if getattr(self, key) < 1:
                raise UserError(f"caption.{key} must be at least 1, not {getattr(self, key)}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise UserError(f"caption.dtype must be float32, bfloat16 or float16, not '{self.dtype}'")
        if self.cpus_per_actor < 0 or self.gpus_per_actor < 0:
            raise UserError("caption.cpus_per_actor and caption.gpus_per_actor cannot be negative")
