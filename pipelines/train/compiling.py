"""Decoder layers and towers through `torch.compile`: the same numbers in fewer and larger kernels.

On an H100 with MGM-2B under 24 GB, micro-batch 8: 19.9 samples/s plain, 28.8 with compiled decoder layers, 30.8 with
the towers too (tests/bench/results/h100-training.jsonl). ConvNeXt in channels_last was no faster there, so it stays as
it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from pipelines.mgm.modeling import MGMForConditionalGeneration
from pipelines.progress import say
from pipelines.train.step import StepResult

_SHAPES = 64
"""Graphs that may be made of one layer: rows with and without images, full and last micro-batches. Dynamo stops
compiling after eight, and then says nothing."""


def compile_layers(model: MGMForConditionalGeneration) -> list[torch.nn.Module]:
    """Compile what repeats, layer by layer, in place: a graph is made once and serves all layers of its kind.

    Nothing is compiled before it is first called. Returns the layers.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _SHAPES)
    layers: list[torch.nn.Module] = [*model.model.language_model.layers, *model.model.vision_tower.encoder.layers]
    layers += [layer for stage in model.model.vision_tower_aux.encoder["stages"] for layer in stage.layers]  # type: ignore[attr-defined]
    for layer in layers:
        layer.compile()
    return layers


class Compiled:
    """Takes the first step of a compiled model: says how long making the kernels took, and does without them when the
    compiler fails.

    Args:
        layers: as `compile_layers` gives them.
        what: how messages begin; None keeps silent, as all workers but the first do.
    """

    def __init__(self, layers: list[torch.nn.Module], what: str | None) -> None:
        self.layers, self.what = layers, what

    def first_step(self, step: Callable[[], StepResult], start_over: Callable[[], Any]) -> StepResult:
        """The result of `step()`.

        Args:
            start_over: brings back the state before the step, as far as one that failed changes it.
        """
        from torch._dynamo.exc import TorchDynamoException
        from torch._inductor.exc import InductorError

        started = time.monotonic()
        try:
            result = step()
        except (TorchDynamoException, InductorError) as error:
            for layer in self.layers:
                layer._compiled_call_impl = None
            start_over()
            self._say(f"goes on without compiled layers ({str(error).strip().splitlines()[0][:200]})")
            return step()
        self._say(f"first step with compiled layers in {time.monotonic() - started:.0f} s")
        return result

    def _say(self, text: str) -> None:
        if self.what is not None:
            say(f"{self.what}: {text}")
