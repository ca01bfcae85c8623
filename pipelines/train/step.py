"""One optimizer step, torch only: what may learn, the loss, the schedule, and data-parallel AdamW.

The DeepSpeed twin of `TorchEngine` is in zero.py; loop.py drives either on Ray Train.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipelines.errors import UserError, WorkFailed
from pipelines.mgm.modeling import MGMForConditionalGeneration
from pipelines.mgm.names import LANGUAGE_MODEL, PROJECTOR, WITHOUT_EFFECT
from pipelines.train.config import LoraSettings, PhaseConfig
from pipelines.train.data import IGNORE, Batch
from pipelines.train.features import blank_outputs, image_features, tower_outputs


@dataclass
class StepResult:
    """loss: mean over the step's target tokens; grad_norm: before clipping; samples: of all workers."""

    loss: float
    grad_norm: float
    samples: int


class Engine(Protocol):
    """What turns micro-batches into updated weights. Every method is collective: all workers call it."""

    named: dict[str, nn.Parameter]

    def step(self, batches: list[Batch], learning_rate: float) -> StepResult:
        """One optimizer step over this worker's micro-batches."""

    def weights(self) -> dict[str, torch.Tensor]:
        """Full float32 CPU copies of what learns, named as in the model, on every worker."""

    def save(self, directory: Path) -> None:
        """This worker's part of the optimizer's state."""

    def load(self, directory: Path) -> None:
        """Continue from what `save` wrote; the weights were loaded into the model before."""

    def close(self) -> None:
        """Give back what the next phase needs."""


def train_projector(model: MGMForConditionalGeneration) -> None:
    """Let the projector and the uni-modules learn, in float32."""
    for name, parameter in model.named_parameters():
        if name.startswith(PROJECTOR) and name not in WITHOUT_EFFECT:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def add_lora(model: MGMForConditionalGeneration, settings: LoraSettings, seed: int) -> Any:
    """Put LoRA layers into the language model, in place; returns their `LoraConfig`.

    Raises:
        UserError: the regular expression is none, matches nothing, or matches something outside of the language model.
    """
    from peft import LoraConfig, get_peft_model

    lora_targets(model, settings.target_modules)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        task_type="CAUSAL_LM",
    )
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    torch.manual_seed(seed)
    get_peft_model(model, config)
    for name, parameter in model.named_parameters():  # PEFT freezes whatever is not LoRA
        parameter.requires_grad_("lora_" in name or name in trained)
    return config


def lora_targets(model: nn.Module, pattern: str) -> list[str]:
    """Full paths of the linear layers that the expression matches. Raises `UserError`, see `add_lora`."""
    key = f"train.lora.target_modules '{pattern}'"
    try:
        matcher = re.compile(pattern)
    except re.error as error:
        raise UserError(f"{key} is not a regular expression ({error})") from error
    names = [name for name, _ in model.named_modules() if name and matcher.fullmatch(name)]
    if not names:
        example = next(
            name
            for name, module in model.named_modules()
            if name.startswith(LANGUAGE_MODEL) and isinstance(module, nn.Linear)
        )
        raise UserError(f"{key} matches no module; it must match full paths such as {example}")
    modules = dict(model.named_modules())
    other = [name for name in names if not isinstance(modules[name], nn.Linear)]
    if other:
        kind = type(modules[other[0]]).__name__
        raise UserError(f"{key} matches {len(other)} module(s) that are no linear layer, e.g. {other[0]}, a {kind}")
    outside = [name for name in names if not name.startswith(LANGUAGE_MODEL)]
    if outside:
        raise UserError(f"{key} matches {len(outside)} module(s) outside of the language model, e.g. {outside[0]}")
    return names


def prepare(model: MGMForConditionalGeneration, checkpointing: bool) -> None:
    """Training mode for the language model and what learns; the frozen towers stay in evaluation mode."""
    model.model.language_model.train()
    if checkpointing:
        language_model = model.model.language_model
        new = hasattr(language_model, "activation_checkpointing_enable")  # its name in transformers from 5.20 on
        enable = language_model.activation_checkpointing_enable if new else language_model.gradient_checkpointing_enable
        enable({"use_reentrant": False})


class TrainForward(nn.Module):
    """Batch in, summed token loss out: the one module that DDP and DeepSpeed wrap.

    Args:
        normalize: uint8 pixels -> the two pixel tensors, `MGMImageProcessor.normalize`.
        dtype: cast the towers' outputs to this; None leaves it to autocast.
    """

    def __init__(
        self,
        model: MGMForConditionalGeneration,
        normalize: Callable[[torch.Tensor], Any],
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.model, self.normalize, self.dtype = model, normalize, dtype

    def forward(self, batch: Batch) -> torch.Tensor:
        """Cross-entropy summed over the batch's target tokens, in float32."""
        parts = batch.features
        if batch.pixels is not None:
            parts = tower_outputs(self.model.model, *self.normalize(batch.pixels))
        shown = parts is not None
        if parts is None:
            parts = blank_outputs(self.model.model)
        if self.dtype is not None:
            parts = (parts[0].to(self.dtype), parts[1].to(self.dtype))
        features = image_features(self.model.model, parts)
        labels = batch.labels[:, 1:]
        # Logits are the largest tensor of all (a vocabulary wide): only where some row has a target.
        wanted = (labels != IGNORE).any(0).nonzero().squeeze(-1)
        logits = self.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            image_features=features if shown else None,
            use_cache=False,
            logits_to_keep=wanted,
        ).logits
        loss = F.cross_entropy(
            logits.float().flatten(0, 1), labels[:, wanted].flatten(), ignore_index=IGNORE, reduction="sum"
        )
        # What learns takes part in every micro-batch, where there is no image with a gradient of zero: ZeRO-3 and DDP
        # count on every parameter, and would otherwise use what an earlier micro-batch left (the original's trainer
        # feeds a blank image for the same reason).
        return loss if shown else loss + 0.0 * features.float().sum()


def autocast(device: torch.device, precision: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """A factory of contexts in which the forward pass computes in `precision`."""
    if precision == "float32":
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)


def learning_rate(phase: PhaseConfig, step: int) -> float:
    """Rate of step `step` (from 0): linear warm-up, then half a cosine to zero. No state: a restart needs the step
    only.
    """
    warmup = math.ceil(phase.warmup * phase.steps)
    if step < warmup:
        return phase.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(phase.steps - warmup, 1)
    return phase.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def adamw(parameters: Iterable[tuple[str, nn.Parameter]], phase: PhaseConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices, not biases and norms."""
    parameters = list(parameters)
    groups = [
        {"params": [p for _, p in parameters if p.ndim >= 2], "weight_decay": phase.weight_decay},
        {"params": [p for _, p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=phase.learning_rate)


def total(value: float, device: torch.device) -> float:
    """Sum over all workers."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return float(tensor)


def require_finite(loss: float, grad_norm: float) -> None:
    """Raise `WorkFailed` on numbers that no further step can mend."""
    for what, value in (("training loss", loss), ("gradient norm", grad_norm)):
        if not math.isfinite(value):
            raise WorkFailed(f"the {what} became {value}; lower the learning rate or look at the data")


class TorchEngine:
    """Single-process or DistributedDataParallel training with float32 master weights."""

    def __init__(
        self,
        forward: TrainForward,
        phase: PhaseConfig,
        precision: str,
        device: torch.device,
    ) -> None:
        self.phase, self.device = phase, device
        self.autocast = autocast(device, precision)
        self.named = {n: p for n, p in forward.model.named_parameters() if p.requires_grad}
        self.optimizer = adamw(self.named.items(), phase)
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.forward: nn.Module = forward
        if self.world > 1:
            self.forward = DistributedDataParallel(
                forward,
                device_ids=[device] if device.type == "cuda" else None,
                forward_sync_buffers=False,
            )

    def step(self, batches: list[Batch], learning_rate: float) -> StepResult:
        """Accumulate `batches`, clip, update. The loss weighs every target token of the step alike, however the rows
        were spread over micro-batches and workers: accumulating is the same as one large batch.
        """
        targets = total(sum(batch.targets for batch in batches), self.device)
        samples = total(sum(batch.samples for batch in batches), self.device)
        loss_sum = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches):
            with self._sync(last=number == len(batches) - 1):
                with self.autocast():
                    loss = self.forward(batch.to(self.device))
                (loss * (self.world / targets)).backward()  # DDP averages gradients over the workers
            loss_sum += loss.detach()
        loss_mean = total(float(loss_sum), self.device) / targets
        grad_norm = float(nn.utils.clip_grad_norm_(self.named.values(), self.phase.max_grad_norm))
        require_finite(loss_mean, grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss_mean, grad_norm, int(samples))

    def _sync(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Exchange gradients only with the step's last micro-batch."""
        if isinstance(self.forward, DistributedDataParallel) and not last:
            return self.forward.no_sync()
        return contextlib.nullcontext()

    def weights(self) -> dict[str, torch.Tensor]:
        """See `Engine.weights`."""
        return {name: p.detach().float().cpu().clone() for name, p in self.named.items()}

    def save(self, directory: Path) -> None:
        """All workers hold the same state: the first one writes it."""
        if not dist.is_initialized() or dist.get_rank() == 0:
            torch.save(self.optimizer.state_dict(), directory / "optimizer.pt")

    def load(self, directory: Path) -> None:
        """Continue from what `save` wrote (the weights were loaded into the model before)."""
        state = torch.load(directory / "optimizer.pt", map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(state)

    def close(self) -> None:
        """Nothing to give back."""
