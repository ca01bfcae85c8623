"""A model's forward pass with one tensor in memory at a time: the model lies on the meta device, and each module gets
its parameters when it is called and loses them when it is done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pipelines.adapters import probe
from pipelines.mgm.configuration import MGMConfig
from pipelines.mgm.names import EMBEDDING, PROJECTOR
from pipelines.mgm.skeleton import skeleton

Source = Callable[[str], torch.Tensor]
"""Name of a parameter -> its values, in any dtype."""


class Lent(nn.Module):
    """Stands where another module would stand that is made for every call and forgotten after it."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.make = make

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module that is made."""
        return self.make()(*args, **kwargs)


def logits(
    config: MGMConfig, source: Source, inputs: dict[str, torch.Tensor], instead: dict[str, Callable[[], nn.Module]]
) -> torch.Tensor:
    """Float32 logits, as of `probe.logits`, of a model whose parameters `source` gives, computed in float32.

    Peak memory is that of the largest parameter in float32, of the projector and uni-modules, and of what is computed.

    Args:
        instead: module -> what makes the one that is called in its place.
    """
    model = skeleton(config, buffers=True)
    names = {parameter: name for name, parameter in model.named_parameters()}
    if model.config.tie_word_embeddings:
        names[model.lm_head.weight] = EMBEDDING
    for name, module in list(model.named_modules()):
        if name in instead:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, Lent(instead[name]))
        elif name.startswith(tuple(prefix.removesuffix(".") for prefix in PROJECTOR)):
            _fill(module, names, source)  # mining reads these without calling them
        elif module._parameters:
            module.register_forward_pre_hook(lambda module, _: _fill(module, names, source))
            module.register_forward_hook(_hollow_out(module))
    return probe.logits(model, inputs)


def _fill(module: nn.Module, names: dict[nn.Parameter, str], source: Source) -> None:
    for key, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[key] = nn.Parameter(source(names[parameter]).float(), requires_grad=False)


def _hollow_out(module: nn.Module) -> Callable[..., None]:
    own = dict(module._parameters)
    return lambda module, *_: module._parameters.update(own)
