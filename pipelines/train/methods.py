"""What learns in a phase, and how the language model does: `train.method`.

`make_learn` changes a model in place and returns the `Method`, which is asked by the training step for what its method
adds to it: a prefix, a penalty, a budget.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from pipelines.errors import UserError
from pipelines.mgm.modeling import MGMForConditionalGeneration
from pipelines.mgm.names import HEAD, LANGUAGE_MODEL, MINING, PROJECTOR, WITHOUT_EFFECT
from pipelines.train.config import PhaseConfig, TrainConfig
from pipelines.train.prefix import add_prefix, prefix_cache

_PENALTY_EPS = 1e-12


class Method:
    """How the language model learns; this one adds nothing to a step, as LoRA and full training do not.

    Attributes:
        peft_config: what PEFT has to know to load the result; None without an adapter.
    """

    def __init__(self, peft_config: Any = None) -> None:
        self.peft_config = peft_config

    def past(self, rows: int) -> Cache | None:
        """Keys and values that stand before every row of a batch."""
        return None

    def add_penalty(self) -> None:
        """Add the gradients of what the method adds to the mean loss of a step; alike on every worker."""

    def after_step(self) -> None:
        """Once an optimizer step is done, while its gradients are still there."""

    def figures(self) -> dict[str, float]:
        """What its log lines say besides."""
        return {}

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint has to hold besides weights."""
        return {}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from `state`."""


class Prefix(Method):
    """Learned keys and values; see prefix.py."""

    def __init__(self, model: MGMForConditionalGeneration, peft_config: Any) -> None:
        super().__init__(peft_config)
        self.encoder = model.prompt_encoder

    def past(self, rows: int) -> Cache:
        """See `Method.past`."""
        return prefix_cache(self.encoder, self.peft_config, rows)  # type: ignore[arg-type]


class AdaLora(Method):
    """LoRA in the form of a singular value decomposition, whose ranks move to the modules that need them.

    PEFT's `RankAllocator` decides; what it remembers of earlier steps goes into checkpoints.
    """

    def __init__(self, tuner: Any, peft_config: Any, orthogonality: float) -> None:
        super().__init__(peft_config)
        self.tuner, self.allocator, self.orthogonality = tuner, tuner.rankallocator, orthogonality
        self.steps = 0
        named = tuner.model.named_parameters()
        self.vectors = {n: p for n, p in named if p.requires_grad and (".lora_A." in n or ".lora_B." in n)}

    def add_penalty(self) -> None:
        """Equation 4 of the paper: what is not orthonormal costs, averaged over the matrices as in PEFT."""
        if not self.orthogonality:
            return
        parameters = list(self.vectors.values())
        with torch.enable_grad():
            far = [_far_from_orthonormal(p if ".lora_A." in n else p.T) for n, p in self.vectors.items()]
            # by hand, and not by `backward`: DDP would take it for one more micro-batch
            gradients = torch.autograd.grad(self.orthogonality * torch.stack(far).mean(), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            assert parameter.grad is not None
            parameter.grad += gradient

    def after_step(self) -> None:
        """Watch the gradients, and take ranks away where the schedule says so."""
        self.steps += 1
        self.tuner.update_and_allocate(self.steps)

    def ranks(self) -> dict[str, int]:
        """Module -> singular values that are left."""
        pattern = self.peft_config.rank_pattern or {}
        if pattern:
            return {name.split(".lora_")[0]: int(sum(kept)) for name, kept in pattern.items()}
        return {n.split(".lora_")[0]: p.shape[0] for n, p in self.vectors.items() if ".lora_A." in n}

    def figures(self) -> dict[str, float]:
        """The ranks' mean, smallest and largest."""
        ranks = list(self.ranks().values())
        return {"rank": sum(ranks) / len(ranks), "rank_least": min(ranks), "rank_most": max(ranks)}

    def state(self) -> dict[str, torch.Tensor]:
        """See `Method.state`."""
        pattern = self.peft_config.rank_pattern or {}
        kept = {f"pattern|{name}": torch.tensor(kept) for name, kept in pattern.items()}
        for what in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
            kept |= {f"{what}|{name}": tensor for name, tensor in getattr(self.allocator, what).items()}
        return kept | {"steps": torch.tensor(self.steps)}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """See `Method.load`."""
        self.steps = int(state["steps"])
        device = next(iter(self.vectors.values())).device
        for key, tensor in state.items():
            what, _, name = key.partition("|")
            if what == "pattern":
                self.peft_config.rank_pattern = (self.peft_config.rank_pattern or {}) | {name: tensor.tolist()}
            elif name:
                getattr(self.allocator, what)[name] = tensor.to(device)


def _far_from_orthonormal(rows: torch.Tensor) -> torch.Tensor:
    gram = rows @ rows.T
    return ((gram - torch.eye(len(gram), device=gram.device)).square().sum() + _PENALTY_EPS).sqrt()


def make_learn(model: MGMForConditionalGeneration, phase: PhaseConfig, config: TrainConfig) -> Method:
    """Let `phase.learn` learn, in float32, and nothing else; in place.

    Args:
        phase: as `TrainConfig.phase` gives it.

    Raises:
        UserError: `train.lora.target_modules` fits no module, or one that it may not.
    """
    learn = phase.learn or []
    method = Method()
    model.requires_grad_(False)
    if "language_model" in learn:
        method = _tuned_language_model(model, phase, config)
    for name, parameter in model.named_parameters():
        group = group_of(name)
        if group in learn and group != "language_model" and name not in WITHOUT_EFFECT:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    return method


def group_of(name: str) -> str | None:
    """The group of `train.*.learn` that a parameter belongs to, by its name in the model; towers have none."""
    if name.startswith(MINING):
        return "uni_modules"
    if name.startswith(PROJECTOR):
        return "projector"
    return "language_model" if name.startswith((LANGUAGE_MODEL, HEAD, "prompt_encoder.")) else None


def _tuned_language_model(model: MGMForConditionalGeneration, phase: PhaseConfig, config: TrainConfig) -> Method:
    if config.method == "full":
        for name, parameter in model.named_parameters():
            if group_of(name) == "language_model":
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        return Method()
    torch.manual_seed(config.seed)
    if config.method == "prefix":
        from peft import PrefixTuningConfig

        prefix = PrefixTuningConfig(num_virtual_tokens=config.prefix.tokens, task_type="CAUSAL_LM")
        add_prefix(model, prefix)
        return Prefix(model, prefix)
    from peft import get_peft_model

    lora_targets(model, config.lora.target_modules)
    peft_config = _lora_config(phase, config)
    tuner = get_peft_model(model, peft_config).base_model
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    if config.method == "adalora":
        return AdaLora(tuner, peft_config, config.adalora.orthogonality)
    return Method(peft_config)


def _lora_config(phase: PhaseConfig, config: TrainConfig) -> Any:
    from peft import AdaLoraConfig, LoraConfig

    lora, budget = config.lora, config.adalora
    shared: dict[str, Any] = {
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": lora.target_modules,
        "task_type": "CAUSAL_LM",
    }
    if config.method == "adalora":
        return AdaLoraConfig(
            init_r=budget.initial_rank or lora.rank + (lora.rank + 1) // 2,
            target_r=lora.rank,
            tinit=int(budget.warmup * phase.steps),
            tfinal=int(budget.final * phase.steps),
            deltaT=budget.every,
            orth_reg_weight=budget.orthogonality,
            total_step=phase.steps,
            **shared,
        )
    return LoraConfig(r=lora.rank, use_rslora=config.method == "rslora", use_dora=config.method == "dora", **shared)


def lora_targets(model: nn.Module, pattern: str) -> list[str]:
    """Full paths of the linear layers that the expression matches.

    Raises:
        UserError: the regular expression is none, matches nothing, or matches something outside of the language model.
    """
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


def quantization(config: TrainConfig) -> Any | None:
    """How the frozen language model is packed: QLoRA's 4-bit NormalFloat with double quantization (Dettmers et al.
    2023, arXiv:2305.14314); None for every other method.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if config.method != "qlora":
        return None
    import importlib.util

    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("train.method qlora needs bitsandbytes: pip install bitsandbytes")
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
