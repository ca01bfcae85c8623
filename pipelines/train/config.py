"""The `train` section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from pipelines.demand import Demand
from pipelines.errors import UserError
from pipelines.mgm.templates import ALIASES, TEMPLATES
from pipelines.train.trackers import SERVICES

AUTO = "auto"
GROUPS = ("projector", "uni_modules", "language_model")
METHODS = ("lora", "rslora", "dora", "qlora", "adalora", "prefix", "full")
SCHEDULES = ("cosine", "linear", "constant")
_ALIGN_RATE, _FULL_RATE, _LORA_RATE, _PREFIX_RATE = 1e-3, 2e-5, 2e-4, 1e-2
DDP_ONLY = ("qlora", "adalora", "prefix")
"""Methods whose weights no ZeRO stage has been shown to shard rightly: packed ones, and those that watch gradients."""


@dataclass
class PhaseConfig:
    """One training phase.

    Attributes:
        steps: optimizer steps; 0 leaves the phase out. Steps, not epochs, are what a fair comparison fixes: arms of
            unequal size then see equally many samples.
        epochs: passes over the phase's rows; where given, the steps follow from it.
        learn: what learns: projector, uni_modules (patch info mining) and language_model, the latter in the way that
            `train.method` names; empty: the first two in align, all in instruct.
        learning_rate: peak of the schedule; empty: 1e-3 in align (the pretraining scripts of LLaVA and MGM); in
            instruct 2e-4 with 2e-5 for projector and uni-modules (LLaVA's `finetune_lora.sh`), or 2e-5 for all where
            the method is full (MGM's second stage), or 1e-2 for a prefix (PEFT's own example).
        rates: peaks of single groups where they differ from `learning_rate`, e.g. `{projector: 2.0e-5}`.
        schedule: after the warm-up: cosine or linear down to zero, or constant.
        warmup: share of the steps over which the learning rate rises from 0.
        weight_decay: AdamW's.
        batch: samples of one optimizer step, all workers together: with the data's order it is what decides the
            result, however it is spread over workers and forward passes. None: workers x micro_batch x accumulation.
        micro_batch: samples per worker and forward pass; `auto`: the largest power of two that fits the card by
            `pipelines.train.memory`, which needs a `batch`.
        accumulation: forward passes per worker and optimizer step; follows from `batch` where that is given.
        max_grad_norm: gradients are clipped to this norm.
        template: the form of its conversations, one of gemma, vicuna_v1, llama_3, mistral_instruct, chatml_direct and
            plain (the image, then the caption); `auto`: the one that the original trains this language model with in
            this phase.
    """

    steps: int = 100
    epochs: float | None = None
    learn: list[str] | None = None
    learning_rate: float | None = None
    rates: dict[str, float] = field(default_factory=dict)
    schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    batch: int | None = None
    micro_batch: int | str = 1
    accumulation: int = 1
    max_grad_norm: float = 1.0
    template: str = "auto"

    def check(self, name: str) -> None:
        """Raise `UserError` naming the key of an impossible value."""
        if isinstance(self.micro_batch, str) and self.micro_batch != AUTO:
            raise UserError(f"train.{name}.micro_batch is a number or auto, not '{self.micro_batch}'")
        if self.micro_batch == AUTO and self.batch is None:
            raise UserError(f"train.{name}.micro_batch auto needs train.{name}.batch: samples of one optimizer step")
        for key in ("batch", "micro_batch", "accumulation"):
            if getattr(self, key) not in (None, AUTO) and getattr(self, key) < 1:
                raise UserError(f"train.{name}.{key} must be at least 1, not {getattr(self, key)}")
        if self.steps < 0:
            raise UserError(f"train.{name}.steps cannot be negative")
        if self.epochs is not None and self.epochs <= 0:
            raise UserError(f"train.{name}.epochs must be positive, not {self.epochs:g}; steps: 0 leaves a phase out")
        rates = [*self.rates.values(), *([] if self.learning_rate is None else [self.learning_rate])]
        if min(rates, default=1.0) <= 0 or self.max_grad_norm <= 0:
            raise UserError(f"train.{name}: learning_rate, rates and max_grad_norm must be positive")
        unknown = sorted({*(self.learn or ()), *self.rates} - set(GROUPS))
        if unknown or self.learn == []:
            wrong = f"not '{unknown[0]}'" if unknown else "and at least one has to learn"
            raise UserError(f"train.{name}: learn and rates name some of {', '.join(GROUPS)}, {wrong}")
        if self.schedule not in SCHEDULES:
            raise UserError(f"train.{name}.schedule must be one of {', '.join(SCHEDULES)}, not '{self.schedule}'")
        if not 0 <= self.warmup < 1:
            raise UserError(f"train.{name}.warmup is a share of the steps, from 0 to below 1")
        if self.template not in ("auto", *TEMPLATES, *ALIASES):
            known = ", ".join(["auto", *TEMPLATES])
            raise UserError(f"train.{name}.template must be one of {known}, not '{self.template}'")

    def per_step(self, workers: int) -> int:
        """Samples of one optimizer step, all workers together."""
        return self.batch or workers * int(self.micro_batch) * self.accumulation

    def settled(self, name: str, workers: int, micro_batch: int | None = None) -> PhaseConfig:
        """The same steps with this micro-batch (its own, or for `auto` 1), the accumulation following from it.

        Raises:
            UserError: the batch does not divide by it.
        """
        micro = micro_batch or (1 if self.micro_batch == AUTO else int(self.micro_batch))
        batch = self.per_step(workers)
        if batch % (workers * micro):
            fit = [str(n) for n in range(1, batch // micro + 1) if batch % (n * micro) == 0]
            instead = f"workers may be {', '.join(fit)}" if fit else "micro_batch must divide it"
            raise UserError(
                f"train.{name}: the {batch} samples of a step do not divide into {workers} worker(s) with "
                f"micro-batches of {micro}; {instead}"
            )
        return replace(self, batch=batch, micro_batch=micro, accumulation=batch // (workers * micro))


@dataclass
class LoraSettings:
    """LoRA (Hu et al. 2021, arXiv:2106.09685) on the language model, and what its relatives share with it.

    Attributes:
        rank: r; of AdaLoRA the average that is left in the end.
        alpha: the update is scaled by alpha / r, by alpha / sqrt(r) where the method is rslora.
        dropout: on the adapter's input.
        target_modules: a regular expression matched against *full* module paths, so that a tower's `q_proj` is never
            hit.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.1
    target_modules: str = r"model\.language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise UserError("train.lora: rank must be at least 1 and alpha positive")
        if not 0 <= self.dropout < 1:
            raise UserError(f"train.lora.dropout is a probability below 1, not {self.dropout}")


@dataclass
class AdaLoraSettings:
    """The budget of AdaLoRA (Zhang et al. 2023, arXiv:2303.10512), beside `lora`.

    Attributes:
        initial_rank: of every module in the beginning; empty: one and a half times `lora.rank`, as in the paper.
        warmup: share of the steps before any rank is taken away.
        final: share of the steps, at the end, in which ranks stay as they are.
        every: steps between two allocations.
        orthogonality: weight of the penalty that keeps the singular vectors apart.
    """

    initial_rank: int | None = None
    warmup: float = 0.1
    final: float = 0.3
    every: int = 1
    orthogonality: float = 0.1

    def __post_init__(self) -> None:
        if self.warmup < 0 or self.final < 0 or self.warmup + self.final >= 1:
            raise UserError("train.adalora: warmup and final are shares of the steps, together below 1")
        if self.every < 1 or self.orthogonality < 0:
            raise UserError("train.adalora: every must be at least 1, and orthogonality not negative")


@dataclass
class PrefixSettings:
    """Prefix tuning (Li and Liang 2021, arXiv:2101.00190), without the reparametrization.

    Attributes:
        tokens: learned key/value pairs that stand before every conversation, in each layer.
    """

    tokens: int = 16

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UserError(f"train.prefix.tokens must be at least 1, not {self.tokens}")


def _align() -> PhaseConfig:
    return PhaseConfig(micro_batch=8, accumulation=4)


def _instruct() -> PhaseConfig:
    return PhaseConfig(micro_batch=1, accumulation=128)


WITHOUT = "train.without"


@dataclass
class TrainConfig:
    """Alignment of the projector on captions, then tuning of the language model on instructions.

    Attributes:
        model: Hugging Face directory of the base MGM.
        instruct_data: LLaVA JSON of the instruction set; None leaves the instruct phase out.
        align: phase 1: by default projector and uni-modules learn on captions, everything else is frozen.
        instruct: phase 2: by default the language model learns, and projector and uni-modules go on learning.
        method: how the language model learns: lora, rslora, dora, qlora, adalora, prefix or full.
        lora: the adapter of lora, rslora, dora, qlora and adalora.
        adalora: its budget.
        prefix: its length.
        workers: Ray Train workers.
        cpus_per_worker: CPUs that Ray reserves for a worker; also its torch threads.
        use_gpu: one GPU per worker.
        strategy: `ddp`, `zero2` or `zero3` (DeepSpeed).
        precision: `bf16` or `float32` for the forward and backward pass; master weights are float32.
        compile: decoder layers and towers through torch.compile; empty: on a CUDA device with strategy ddp.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        checkpoint_every: optimizer steps between checkpoints.
        log_every: optimizer steps between log lines.
        held_out: rows of `instruct_data` that no phase trains on, the same ones for every arm and seed (at most every
            tenth row); their loss is measured in both phases. 0: none.
        held_out_every: optimizer steps between two measurements, beside those after a phase's first and last step.
        tracker: `mlflow` or `wandb`: the log's lines go there, too (package extra `trackers`); `none`.
        max_length: longest token sequence, visual tokens included; longer rows are counted and cut as the original
            does.
        feature_cache_mb: memory per worker for the frozen towers' outputs, so that each image is encoded once and not
            every epoch; a data set whose outputs do not fit is encoded afresh. 0: never keep them.
        without: what `captune overlap` wrote: rows of the instructions (or pairs) that it looked at are left out where
            they show a benchmark's picture.
        max_broken_share: largest share of a phase's rows that may turn out unusable; 1 trains on whatever is left.
        seed: order of the data, dropout and the adapter's initial values.
        max_failures: how often a dead worker group is started again.
    """

    model: str = ""
    instruct_data: str | None = None
    align: PhaseConfig = field(default_factory=_align)
    instruct: PhaseConfig = field(default_factory=_instruct)
    method: str = "lora"
    lora: LoraSettings = field(default_factory=LoraSettings)
    adalora: AdaLoraSettings = field(default_factory=AdaLoraSettings)
    prefix: PrefixSettings = field(default_factory=PrefixSettings)
    workers: int = 1
    cpus_per_worker: float = 1.0
    use_gpu: bool = False
    strategy: str = "ddp"
    precision: str = "bf16"
    compile: bool | None = None
    gradient_checkpointing: bool = True
    checkpoint_every: int = 100
    log_every: int = 1
    held_out: int = 64
    held_out_every: int = 25
    tracker: str = "none"
    max_length: int = 2048
    feature_cache_mb: int = 2048
    without: str | None = None
    max_broken_share: float = 0.5
    seed: int = 0
    max_failures: int = 3

    def __post_init__(self) -> None:
        self.align.check("align")
        self.instruct.check("instruct")
        for name in ("align", "instruct"):
            phase: PhaseConfig = getattr(self, name)
            if phase.batch is not None and self.workers > 0 and self.runs(name):
                phase.settled(name, self.workers)
        for key in ("workers", "checkpoint_every", "log_every", "held_out_every", "max_length"):
            if getattr(self, key) < 1:
                raise UserError(f"train.{key} must be at least 1, not {getattr(self, key)}")
        for key in ("held_out", "feature_cache_mb", "max_failures"):
            if getattr(self, key) < 0:
                raise UserError(f"train.{key} cannot be negative")
        if not 0 <= self.max_broken_share <= 1:
            raise UserError(f"train.max_broken_share is a share between 0 and 1, not {self.max_broken_share:g}")
        if self.cpus_per_worker <= 0:
            raise UserError(f"train.cpus_per_worker must be positive, not {self.cpus_per_worker}")
        if self.tracker not in ("none", *SERVICES):
            raise UserError(f"train.tracker must be none, {' or '.join(SERVICES)}, not '{self.tracker}'")
        if self.strategy not in ("ddp", "zero2", "zero3"):
            raise UserError(f"train.strategy must be ddp, zero2 or zero3, not '{self.strategy}'")
        if self.compile and self.strategy != "ddp":
            raise UserError(f"train.compile goes with strategy ddp only, not {self.strategy}")
        if self.method not in METHODS:
            raise UserError(f"train.method must be one of {', '.join(METHODS)}, not '{self.method}'")
        if self.method in DDP_ONLY and self.strategy != "ddp":
            raise UserError(f"train.method {self.method} trains with strategy ddp only, not {self.strategy}")
        initial = self.adalora.initial_rank
        if self.method == "adalora" and initial is not None and initial <= self.lora.rank:
            raise UserError(f"train.adalora.initial_rank must be above train.lora.rank, {self.lora.rank}")
        if self.precision not in ("bf16", "float32"):
            raise UserError(f"train.precision must be bf16 or float32, not '{self.precision}'")

    def runs(self, name: str) -> bool:
        """Whether a phase has steps, and data where that is of its own."""
        phase: PhaseConfig = getattr(self, name)
        return phase.steps > 0 and (name == "align" or self.instruct_data is not None)

    def settled(self) -> TrainConfig:
        """With the micro-batch and accumulation of each phase that make up its batch; `auto` is the workers' to say."""
        phases = {name: getattr(self, name) for name in ("align", "instruct") if self.runs(name)}
        settled = {n: p.settled(n, self.workers) for n, p in phases.items() if p.micro_batch != AUTO}
        return replace(self, **settled)

    def phase(self, name: str) -> PhaseConfig:
        """A phase with nothing left to a default: `learn`, the rate of each group that learns in `rates`, and the
        largest of them as `learning_rate`.
        """
        phase: PhaseConfig = getattr(self, name)
        learn = phase.learn or (GROUPS[:2] if name == "align" else GROUPS)
        if phase.learning_rate is not None:
            default = dict.fromkeys(GROUPS, phase.learning_rate)
        elif name == "align":
            default = dict.fromkeys(GROUPS, _ALIGN_RATE)
        else:
            own = {"full": _FULL_RATE, "prefix": _PREFIX_RATE}.get(self.method, _LORA_RATE)
            default = {**dict.fromkeys(GROUPS, _FULL_RATE), "language_model": own}
        rates = {group: phase.rates.get(group, default[group]) for group in GROUPS if group in learn}
        return replace(phase, learn=list(rates), rates=rates, learning_rate=max(rates.values()))

    def demand(self) -> Demand:
        """All workers at once: a step needs every one of them."""
        keys = ("workers", "cpus_per_worker", "use_gpu")
        return Demand("train", "worker", self.workers, self.cpus_per_worker, float(self.use_gpu), keys)
