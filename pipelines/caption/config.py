"""The `caption` section of a recipe."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.blip2.config import BlipConfig
from pipelines.caption.guards import GuardConfig
from pipelines.demand import Demand
from pipelines.errors import UserError
from pipelines.formats.reading import Reading


@dataclass
class CaptionConfig(BlipConfig):
    """How a dataset is captioned: `BlipConfig` says how an image is, the rest by whom, and when to stop.

    Attributes:
        prompt_key: field of a record's `meta` that holds a prompt of its own; where it is absent, `prompt` stands.
        actors: model replicas; each is one Ray actor.
        max_actors: the pool may grow to so many replicas while captions wait for one; 0 keeps it at `actors`.
        cpus_per_actor: CPUs that Ray reserves for a replica (fractions let it share a small machine with the decoders).
        gpus_per_actor: GPUs that Ray reserves for a replica; 0 runs on the CPU.
        rows_per_shard: most rows in one Parquet shard.
        reading: how the dataset is read where it could be meant in more than one way.
        guards: when to stop.
    """

    prompt_key: str = ""
    actors: int = 1
    max_actors: int = 0
    cpus_per_actor: float = 1.0
    gpus_per_actor: float = 0.0
    rows_per_shard: int = 10_000
    reading: Reading = field(default_factory=Reading)
    guards: GuardConfig = field(default_factory=GuardConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("actors", "rows_per_shard"):
            if getattr(self, key) < 1:
                raise UserError(f"caption.{key} must be at least 1, not {getattr(self, key)}")
        if self.max_actors and self.max_actors < self.actors:
            raise UserError(f"caption.max_actors: {self.max_actors} is less than caption.actors, {self.actors}")
        if self.cpus_per_actor < 0 or self.gpus_per_actor < 0:
            raise UserError("caption.cpus_per_actor and caption.gpus_per_actor cannot be negative")

    @property
    def device(self) -> str:
        """Where its replicas run: `cuda` or `cpu`."""
        return "cuda" if self.gpus_per_actor > 0 else "cpu"

    def demand(self) -> Demand:
        """Every replica that is wished for; `caption.sizing` says with how few the pass makes do."""
        most = max(self.actors, self.max_actors)
        keys = ("max_actors" if self.max_actors else "actors", "cpus_per_actor", "gpus_per_actor")
        return Demand("caption", "replica", most, self.cpus_per_actor, self.gpus_per_actor, keys)

    def decides(self) -> dict[str, Any]:
        """Every key that a caption depends on, for the fingerprint of a run; `model` stands there by its content, not
        its name.

        Not batch size, actors, CPUs or guards: they may change between a kill and its rerun.
        """
        # what earlier versions did stands for itself, so that their work can go on
        later = {"products": self.products != "dtype", "resize": self.resize != "pillow"}
        keys = ("prompt", "prompt_key", "max_new_tokens", *(key for key, told in later.items() if told))
        sections = {"decoding": asdict(self.decoding), "candidates": asdict(self.candidates)}
        if self.candidates.clip_model:
            from pipelines.blip2.checkpoint import resolve
            from pipelines.modelfiles import model_identity

            clip = resolve(self.candidates.clip_model, "caption.candidates.clip_model")
            sections["candidates"]["clip_model"] = model_identity(clip)
        if self.candidates.choose == "all" or self.candidates.keep_original:
            sections["samples"] = {"texts": "a row each"}  # earlier versions wrote them into one
        return {key: getattr(self, key) for key in keys} | {"dtype": self.dtype_on(self.device)} | sections
