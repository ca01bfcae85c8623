"""The tiny MGM of the tests of all stages, by the name that it has among training's."""

from __future__ import annotations

from tests.pipelines.tiny_mgm import write_dataset, write_instructions, write_model

__all__ = ["write_dataset", "write_instructions", "write_model"]
