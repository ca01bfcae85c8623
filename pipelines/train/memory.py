"""What a phase takes of a worker's memory, from shapes alone: said before anything is loaded.

A step has a few moments at which most is alive. Each moment's tensors are added up, and the largest sum is the peak
that `torch.cuda.max_memory_allocated` will show; the card itself must hold the allocator's gaps and the CUDA context
besides. Held against peaks measured on a card by tests/pipelines/train/test_memory.py; ZeRO, and methods other than
LoRA, are counted likewise but have not been measured on one.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipelines.errors import UserError
from pipelines.mgm.configuration import MGMConfig
from pipelines.train import activations
from pipelines.train.activations import Micro, Numbers
from pipelines.train.config import TrainConfig
from pipelines.train.methods import group_of, make_learn
from pipelines.train.step import LOGIT_BYTES
from pipelines.train.zero import LIVE_PARAMETERS, bucket_size

GIB = 1 << 30
CARD_24GB = 24 * 10**9
CONTEXT = 600 << 20
"""Bytes of the CUDA context with the kernels of PyTorch's libraries, outside of its allocator."""
WORKSPACE = 32 << 20
"""Bytes that cuBLAS asks of the allocator (on an H100; less on others)."""
GAPS = 0.04
"""Share of the tensors' peak that the allocator holds besides: blocks that no request fits."""
_FLOAT, _HALF = 4, 2
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a packed weight: 4 bits, an 8-bit scale for 64 of them, a float32 scale for 256 of those."""


@dataclass(frozen=True)
class Prediction:
    """Memory of one worker in one phase, in bytes.

    Attributes:
        weights: frozen ones as they are computed with, and those that learn.
        gradients, optimizer: of what learns; AdamW has two moments, and under ZeRO float32 master weights.
        towers: what encoding the images of a micro-batch takes on the way.
        activations: what the forward pass keeps for the backward pass.
        layer: one decoder layer in its backward pass, what it computes anew included.
        logits: of the tokens that the loss sees, with the softmax and its gradient.
        buffers: DeepSpeed's own.
        moments: moment of the step -> bytes of all tensors then.
        host_cache: of the feature cache, in the host's memory.
    """

    weights: int
    gradients: int
    optimizer: int
    towers: int
    activations: int
    layer: int
    logits: int
    buffers: int
    moments: dict[str, int] = field(default_factory=dict)
    host_cache: int = 0

    @property
    def tensors(self) -> int:
        """The largest moment: what `torch.cuda.max_memory_allocated` will say."""
        return max(self.moments.values())

    @property
    def moment(self) -> str:
        """Which one that is."""
        return max(self.moments, key=lambda name: self.moments[name])

    @property
    def card(self) -> int:
        """What a card must have."""
        return int(self.tensors * (1 + GAPS)) + CONTEXT

    def as_json(self) -> dict[str, Any]:
        """In GiB."""
        sizes = {key: value for key, value in asdict(self).items() if key != "moments"}
        gib = {key: round(value / GIB, 3) for key, value in sizes.items()}
        moments = {name: round(value / GIB, 3) for name, value in self.moments.items()}
        return gib | {"peak": round(self.tensors / GIB, 3), "card": round(self.card / GIB, 3), "moments": moments}


class Phase:
    """One phase of a training, as a model without memory for its weights.

    Args:
        model: configuration of the base, or a directory that holds at least its `config.json`.

    Raises:
        UserError: no configuration of an MGM, or `train.lora.target_modules` fits none of its modules.
    """

    def __init__(self, model: MGMConfig | Path | str, config: TrainConfig, name: str) -> None:
        self.model_config = model if isinstance(model, MGMConfig) else read_config(model)
        self.config, self.name, self.settings = config, name, config.phase(name)
        self.model = _skeleton(self.model_config, config.precision)
        make_learn(self.model, self.settings, config)
        self.text = self.model_config.text_config

    @cached_property
    def learns(self) -> int:
        """Numbers that learn."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @cached_property
    def numbers(self) -> Numbers:
        """How its steps compute on a card."""
        compute, ddp = (_FLOAT if self.config.precision == "float32" else _HALF), self.config.strategy == "ddp"
        table = self.model.get_input_embeddings().weight
        return Numbers(compute, ddp and compute == _HALF, table.element_size() if ddp else compute)

    def predict(self, micro: Micro, *, accumulating: bool, images: int = 0) -> Prediction:
        """Memory of a worker.

        Args:
            micro: its largest micro-batch.
            accumulating: gradients of earlier micro-batches are there while the next one is computed.
            images: distinct ones of the phase, for the feature cache; 0: not known.
        """
        held = self._held()
        kept, layer = self._language_model(micro)
        mined = activations.mining(self.model_config, micro, self.numbers) if self._mines else 0
        casts = self._casts()
        at_once = min(micro.targets, max(1, LOGIT_BYTES // (_FLOAT * self.text.vocab_size)))
        word = at_once * self.text.vocab_size * _FLOAT
        towers = activations.towers(self.model_config, micro, self.numbers) if micro.encoded else 0
        static = held["weights"] + held["optimizer"] + held["buffers"] + WORKSPACE
        gradients = held["gradients"]
        before = static + (gradients if accumulating else 0)
        moments = {
            "towers": before + towers,
            "forward": before + mined + kept + casts + 2 * word,
            # the softmax, the gradient of the loss, and that of the logits
            "loss": before + mined + kept + self._copies() + 3 * word,
            "layer": before + mined + kept + layer,
            "projector": static + gradients + mined,
            # AdamW's own copy of a moment, all parameters at once
            "optimizer": static + gradients + self._stepped(),
        }
        host = self.cache(images)
        return Prediction(**held, towers=towers, activations=mined + kept, layer=layer, logits=3 * word,
                          moments=moments, host_cache=host)  # fmt: skip

    def _held(self) -> dict[str, int]:
        """What is there all the time, and the gradients."""
        stage, workers = int(self.config.strategy[-1]) if self.config.strategy != "ddp" else 0, self.config.workers
        frozen = int(sum(_stored(n, p, self.config, self.numbers) for n, p in self.model.named_parameters()
                         if not p.requires_grad))  # fmt: skip
        frozen += sum(b.numel() * b.element_size() for b in self.model.buffers())
        if stage == 0:
            learning = self.learns * _FLOAT
            return {"weights": frozen + learning, "gradients": learning, "optimizer": 2 * learning, "buffers": 0}
        compute, shard = self.numbers.compute, -(-self.learns // workers)
        weights, buffers = frozen + self.learns * compute, bucket_size(self.learns) * compute
        if stage == 2:
            buffers *= 2  # of which one is exchanged while the other fills
        elif workers > 1:
            total = sum(p.numel() for p in self.model.parameters())
            weights, buffers = -(-weights // workers), buffers + min(LIVE_PARAMETERS, total) * compute
        return {"weights": weights, "gradients": shard * _FLOAT, "optimizer": 3 * shard * _FLOAT, "buffers": buffers}

    def _language_model(self, micro: Micro) -> tuple[int, int]:
        """What all its layers keep, and what one of them takes in its backward pass."""
        text, numbers, layers = self.text, self.numbers, self.model.model.language_model.layers
        each = [activations.decoder_layer(layer, text, micro, numbers) for layer in layers]
        hidden = micro.tokens * text.hidden_size
        around = activations.rotation(text, micro, numbers) + hidden * (_FLOAT + numbers.stream)
        inner = text.intermediate_size * getattr(text, "num_experts_per_tok", 1)
        adapted = any(hasattr(module, "lora_A") for module in layers[0].modules())
        # Gradients of the MLP's three inner tensors; or of the adapter's input in float32, twice because of dropout.
        working = max(3 * numbers.compute, (8 if adapted and numbers.autocast else 0))
        at_work = micro.tokens * inner * working + 2 * hidden * numbers.compute
        if self.config.gradient_checkpointing:
            return len(layers) * hidden * numbers.stream + around, max(each) + at_work
        return sum(each) + around, at_work

    @property
    def _mines(self) -> bool:
        return any(
            p.requires_grad for n, p in self.model.named_parameters() if group_of(n) in ("projector", "uni_modules")
        )

    def _copies(self) -> int:
        """Copies of float32 weights of the head, which stay for the backward pass."""
        head: Any = self.model.lm_head.weight
        return head.numel() * _HALF if self.numbers.autocast and head.dtype == torch.float32 else 0

    def _casts(self) -> int:
        """Under autocast the copies of all weights that learn live until the forward pass ends."""
        if not self.numbers.autocast:
            return 0
        layers = self.learns * _HALF if self.config.gradient_checkpointing else 0  # else they are counted as kept
        return max(layers, self._copies())

    def _stepped(self) -> int:
        workers = self.config.workers if self.config.strategy != "ddp" else 1
        return -(-self.learns // workers) * _FLOAT

    def cache(self, images: int) -> int:
        """Bytes of the features of so many images; 0 if that is more than the recipe gives them."""
        one = self.model_config.num_image_tokens * self.model_config.vision_config.hidden_size
        needed = images * (one + activations.detail(self.model_config)) * self.numbers.compute
        return needed if needed <= self.config.feature_cache_mb << 20 else 0


def _stored(name: str, parameter: nn.Parameter, config: TrainConfig, numbers: Numbers) -> float:
    """Bytes of a frozen weight."""
    if config.method == "qlora" and parameter.ndim == 2 and ".layers." in name and group_of(name) == "language_model":
        return parameter.numel() * _NF4
    return parameter.numel() * (parameter.element_size() if config.strategy == "ddp" else numbers.compute)


def read_config(directory: Path | str) -> MGMConfig:
    """The configuration of an MGM's directory, which need not hold its weights.

    Raises:
        UserError: there is none.
    """
    path = Path(directory)
    if not (path / "config.json").is_file():
        raise UserError(f"train.model: {path} holds no config.json; that file alone is enough for a dry run")
    try:
        config: MGMConfig = MGMConfig.from_pretrained(path)
    except (ValueError, OSError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{path}: not the configuration of an MGM ({str(error).splitlines()[0]})") from error
    return config


def _skeleton(config: MGMConfig, precision: str) -> Any:
    """The model as `load_model` makes it for training, on the device `meta`: frozen, in its stored dtype."""
    from pipelines.mgm.skeleton import skeleton

    stored = getattr(config, "dtype", None) or torch.bfloat16
    dtype = torch.float32 if precision == "float32" else getattr(torch, stored) if isinstance(stored, str) else stored
    return skeleton(config, dtype=dtype).requires_grad_(False)


def peak_bytes(device: torch.device) -> int:
    """Most memory so far: on a card what tensors took since the phase began, on a CPU the resident set of the process
    since it started.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def parameter_count(parameter: torch.Tensor) -> int:
    """Its numbers, also where ZeRO-3 keeps only a shard of it here."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
