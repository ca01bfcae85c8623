"""One optimizer step, torch only: the loss, the schedule, and data-parallel AdamW.

The DeepSpeed twin of `TorchEngine` is in zero.py; worker.py drives either on Ray Train.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from pipelines.errors import WorkFailed
from pipelines.mgm.load import quiet as quiet  # whoever steps by hand wants quiet libraries, too
from pipelines.mgm.modeling import MGMForConditionalGeneration
from pipelines.train.config import PhaseConfig
from pipelines.train.data import IGNORE, Batch
from pipelines.train.features import blank_outputs, image_features, tower_outputs
from pipelines.train.fitting import halved, split
from pipelines.train.methods import Method, group_of

LOGIT_BYTES = 1 << 30
"""Logits of one piece of a batch, float32. Gemma's 256,000 words make them the largest tensor of all; in pieces, which
the backward pass computes again, they take so much and not a multiple of it."""


@dataclass(frozen=True)
class Counts:
    """What a step's micro-batches of all workers hold: rows, their tokens (padding is none, visual tokens are some),
    tokens that the loss sees, images that they show, and those that have yet to go through the towers.
    """

    samples: int = 0
    tokens: int = 0
    targets: int = 0
    images: int = 0
    encoded: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass
class StepResult:
    """loss: mean over the step's target tokens; grad_norm: before clipping; counts: of all workers."""

    loss: float
    grad_norm: float
    counts: Counts


class Engine(Protocol):
    """What turns micro-batches into updated weights. Every method is collective: all workers call it."""

    named: dict[str, nn.Parameter]
    method: Method
    cut: int | None

    def step(self, batches: list[Batch], learning_rate: float) -> StepResult:
        """One optimizer step over this worker's micro-batches, cut into pieces of at most `cut` rows."""

    def evaluate(self, batches: list[Batch]) -> float:
        """Mean loss over the target tokens of all workers' batches, of which each has equally many, without dropout;
        changes nothing. NaN when there is no target.
        """

    def weights(self) -> dict[str, torch.Tensor]:
        """Full float32 CPU copies of what learns, named as in the model, on every worker."""

    def save(self, directory: Path) -> None:
        """This worker's part of the optimizer's state."""

    def load(self, directory: Path) -> None:
        """Continue from what `save` wrote; the weights were loaded into the model before."""

    def close(self) -> None:
        """Give back what the next phase needs."""


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
        method: how the language model learns.
        dtype: cast the towers' outputs to this; None leaves it to autocast.
    """

    def __init__(
        self,
        model: MGMForConditionalGeneration,
        normalize: Callable[[torch.Tensor], Any],
        method: Method | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.model, self.normalize, self.method, self.dtype = model, normalize, method or Method(), dtype

    def forward(self, batch: Batch, run_towers: bool = False, targets: int = 0) -> torch.Tensor:
        """Cross-entropy summed over the batch's target tokens, in float32.

        Args:
            run_towers: show the towers a blank image where the batch has none, and forget what they say.
            targets: cut the logits into as many pieces as this number of targets takes, if the batch has fewer.
        """
        torch.manual_seed(batch.seed)
        parts = batch.features
        if batch.pixels is not None:
            parts = tower_outputs(self.model.model, *self.normalize(batch.pixels))
        elif run_towers:
            side = self.model.config.image_size_aux
            blank = torch.zeros((1, 3, side, side), dtype=torch.uint8, device=batch.input_ids.device)
            tower_outputs(self.model.model, *self.normalize(blank))
        shown = parts is not None
        if parts is None:
            parts = blank_outputs(self.model.model, batch.input_ids.device)
        if self.dtype is not None:
            parts = (parts[0].to(self.dtype), parts[1].to(self.dtype))
        features = image_features(self.model.model, parts)
        mask, past = batch.attention_mask, self.method.past(len(batch.input_ids))
        if past is not None:
            mask = torch.cat([mask.new_ones(len(mask), past.get_seq_length()), mask], dim=1)
        # What learns takes part in every micro-batch, where there is no image with a gradient of zero: ZeRO-3 and DDP
        # count on every parameter, and would otherwise use what an earlier micro-batch left (the original's trainer
        # feeds a blank image for the same reason). None of the features goes in with the tokens and not beside them:
        # then the language model has a backward pass too, for which ZeRO-3 on other workers gathers its weights.
        hidden = self.model.model(
            input_ids=batch.input_ids,
            attention_mask=mask,
            past_key_values=past,
            image_features=features if shown else features[:0],
            use_cache=False,
        ).last_hidden_state
        labels = batch.labels[:, 1:]
        learned = labels != IGNORE
        return self._loss(hidden[:, :-1][learned], labels[learned], max(targets, batch.targets))

    def _loss(self, hidden: torch.Tensor, labels: torch.Tensor, targets: int) -> torch.Tensor:
        """Summed cross-entropy of hidden states (targets, D) that have the words `labels` to say."""
        count = -(-4 * self.model.lm_head.out_features * targets // LOGIT_BYTES)
        if count <= 1:
            return self._piece(hidden, labels)
        pieces = zip(hidden.tensor_split(count), labels.tensor_split(count), strict=True)
        return torch.stack([checkpoint(self._piece, *piece, use_reentrant=False) for piece in pieces]).sum()

    def _piece(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.model.lm_head(hidden).float(), labels, reduction="sum")


def autocast(device: torch.device, precision: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """A factory of contexts in which the forward pass computes in `precision`."""
    if precision == "float32":
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)


def learning_rate(phase: PhaseConfig, step: int) -> float:
    """Rate of step `step` (from 0) of the group with the highest peak: linear warm-up, then the schedule. No state: a
    restart needs the step only.

    Args:
        phase: as `TrainConfig.phase` gives it.
    """
    assert phase.learning_rate is not None
    warmup = math.ceil(phase.warmup * phase.steps)
    if step < warmup:
        return phase.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(phase.steps - warmup, 1)
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * share)), "linear": 1 - share, "constant": 1.0}
    return phase.learning_rate * left[phase.schedule]


def adamw(parameters: Iterable[tuple[str, nn.Parameter]], phase: PhaseConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices, not biases and norms; a parameter group has its share of the highest rate."""
    assert phase.learning_rate is not None
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        rate = phase.rates.get(group_of(name) or "", phase.learning_rate)
        decay = phase.weight_decay if parameter.ndim >= 2 else 0.0
        groups.setdefault((rate / phase.learning_rate, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": of, "weight_decay": decay, "share": share} for (share, decay), of in groups.items()],
        lr=phase.learning_rate,
    )


def set_rate(groups: list[dict[str, Any]], learning_rate: float) -> None:
    """Give every parameter group of `adamw` its share of the rate."""
    for group in groups:
        group["lr"] = learning_rate * group["share"]


def total(value: float, device: torch.device) -> float:
    """Sum over all workers."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return float(tensor)


def count(batches: list[Batch], device: torch.device) -> Counts:
    """Of all workers' micro-batches of a step."""
    found = [
        Counts(
            batch.samples,
            int(batch.attention_mask.sum()),
            batch.targets,
            sum(len(part[0]) for part in (batch.features,) if part is not None) + encoded,
            encoded,
        )
        for batch in batches
        for encoded in [0 if batch.pixels is None else len(batch.pixels)]
    ]
    own = astuple(sum(found, Counts()))
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Counts(*own)
    tensor = torch.tensor(own, dtype=torch.int64, device=device)
    dist.all_reduce(tensor)
    return Counts(*tensor.tolist())


def require_finite(loss: float, grad_norm: float) -> None:
    """Raise `WorkFailed` on numbers that no further step can mend."""
    for what, value in (("training loss", loss), ("gradient norm", grad_norm)):
        if not math.isfinite(value):
            raise WorkFailed(f"the {what} became {value}; lower the learning rate or look at the data")


@torch.no_grad()
def mean_loss(
    forward: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    all_do: Iterable[tuple[bool, int]] | None = None,
) -> float:
    """See `Engine.evaluate`. What was in training mode is so again afterwards.

    Args:
        all_do: for each batch, what else `TrainForward` is told.
    """
    training = [module for module in forward.modules() if module.training]
    compiled = any(module._compiled_call_impl is not None for module in forward.modules())
    forward.eval()
    loss_sum, targets = torch.zeros((), dtype=torch.float64, device=device), 0
    # Compiled layers would be compiled anew for evaluation, which takes longer than it could save.
    with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
        for batch, told in zip(batches, all_do or itertools.repeat((False, 0)), strict=False):
            with context():
                loss_sum += forward(batch.to(device), *told).double()
            targets += batch.targets
    for module in training:
        module.training = True
    every = total(targets, device)
    return total(float(loss_sum), device) / every if every else math.nan


class TorchEngine:
    """Data-parallel training with float32 master weights.

    Gradients are exchanged once a step, after every worker has said that its memory sufficed. So one that runs out of
    it leaves nobody waiting: all of them do the step's micro-batches again in halves, and cut later ones, too (`cut`).
    """

    def __init__(
        self,
        forward: TrainForward,
        phase: PhaseConfig,
        precision: str,
        device: torch.device,
    ) -> None:
        self.phase, self.device, self.forward, self.method = phase, device, forward, forward.method
        self.cut: int | None = None
        self.autocast = autocast(device, precision)
        self.named = {n: p for n, p in forward.model.named_parameters() if p.requires_grad}
        self.optimizer = adamw(self.named.items(), phase)
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        if self.world > 1:
            for parameter in self.named.values():
                dist.broadcast(parameter.data, 0)

    def step(self, batches: list[Batch], learning_rate: float) -> StepResult:
        """Accumulate `batches`, clip, update. The loss weighs every target token of the step alike, however the rows
        were spread over micro-batches and workers: accumulating is the same as one large batch.

        Raises:
            WorkFailed: a micro-batch of one sample does not fit the device, or the loss is no number.
        """
        counts = count(batches, self.device)
        loss_sum = self._gradients(batches, counts.targets)
        loss_mean = total(float(loss_sum), self.device) / counts.targets
        self._exchange()
        self.method.add_penalty()
        grad_norm = float(nn.utils.clip_grad_norm_(self.named.values(), self.phase.max_grad_norm))
        require_finite(loss_mean, grad_norm)
        set_rate(self.optimizer.param_groups, learning_rate)
        self.optimizer.step()
        self.method.after_step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss_mean, grad_norm, counts)

    def _gradients(self, batches: list[Batch], targets: int) -> torch.Tensor:
        """This worker's gradients of the mean loss of the step; returns its share of the loss's sum."""
        while True:
            pieces = self._pieces(batches)
            loss_sum = self._accumulate(pieces, targets)
            if total(float(loss_sum is None), self.device) == 0:
                assert loss_sum is not None
                return loss_sum
            del loss_sum
            self.optimizer.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.cut = halved(max(piece.samples for piece in pieces))

    def _pieces(self, batches: list[Batch]) -> list[Batch]:
        """The micro-batches, of no more rows than have been found to fit."""
        config = self.forward.model.config
        return [
            piece
            for batch in batches
            for piece in split(batch, self.cut or batch.samples, config.image_token_id, config.num_image_tokens)
        ]

    def _accumulate(self, batches: list[Batch], targets: int) -> torch.Tensor | None:
        """Gradients of micro-batches one after the other; None: they did not fit the device."""
        loss_sum = torch.zeros((), device=self.device)
        try:
            for batch in batches:
                with self.autocast():
                    loss = self.forward(batch.to(self.device))
                (loss / targets).backward()
                loss_sum += loss.detach()
        except torch.OutOfMemoryError:
            return None
        return loss_sum

    def _exchange(self) -> None:
        """Sum the gradients of all workers."""
        if self.world == 1:
            return
        for parameter in self.named.values():
            if parameter.grad is None:  # none of this worker's rows used it; another's may have
                parameter.grad = torch.zeros_like(parameter)
        sums = [dist.all_reduce(parameter.grad, async_op=True) for parameter in self.named.values()]
        for each in sums:
            each.wait()

    def evaluate(self, batches: list[Batch]) -> float:
        """See `Engine.evaluate`."""
        return mean_loss(self.forward, self._pieces(batches), self.device, self.autocast)

    def weights(self) -> dict[str, torch.Tensor]:
        """See `Engine.weights`."""
        return {name: p.detach().float().cpu().clone() for name, p in self.named.items()}

    def save(self, directory: Path) -> None:
        """All workers hold the same state: the first one writes it."""
        if not dist.is_initialized() or dist.get_rank() == 0:
            torch.save(
                {"optimizer": self.optimizer.state_dict(), "method": self.method.state()}, directory / "optimizer.pt"
            )

    def load(self, directory: Path) -> None:
        """Continue from what `save` wrote (the weights were loaded into the model before)."""
        state = torch.load(directory / "optimizer.pt", map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.method.load(state["method"])

    def close(self) -> None:
        """Nothing to give back."""
