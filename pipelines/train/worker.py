"""What one Ray Train worker does: the phases in turn, from the last checkpoint on."""

from __future__ import annotations

import gc
import json
import logging
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import get_device
from ray.train.v2._internal.execution import context as ray_train_context

from pipelines.errors import UserError, WorkFailed
from pipelines.failures import explained
from pipelines.mgm.adapter import write_adapter
from pipelines.mgm.configuration import MGMConfig
from pipelines.mgm.load import load_config, load_model, load_processor, load_skeleton, quiet
from pipelines.overlapping import rows_of
from pipelines.progress import Progress, say
from pipelines.train import checkpoints, fitting, forecast
from pipelines.train.checkpoints import STATE
from pipelines.train.compiling import Compiled, compile_layers
from pipelines.train.config import AUTO, WITHOUT, PhaseConfig, TrainConfig
from pipelines.train.data import Batch, Loader, Sampler, Share, Templates
from pipelines.train.features import FeatureCache, fill
from pipelines.train.flops import peak_flops, step_flops
from pipelines.train.gauges import TrainGauges
from pipelines.train.held_out import set_aside
from pipelines.train.job import Job
from pipelines.train.log import TrainLog
from pipelines.train.memory import GIB, parameter_count, peak_bytes
from pipelines.train.methods import Method, group_of, lora_targets, make_learn, quantization
from pipelines.train.rows import Rows, read_rows, say_broken
from pipelines.train.step import Counts, Engine, StepResult, TorchEngine, TrainForward, autocast, learning_rate, prepare
from pipelines.train.trackers import Tracker

TRAINED = "trained.safetensors"
_CARD_THREADS = 4
"""Rows prepared at a time for a card: at 768 pixels a processor resizes some 50 a second."""


@dataclass
class State:
    """How far training has come: what a checkpoint holds besides tensors.

    Attributes:
        phase, step: the running phase and its finished steps.
        position: samples of the phase that were used; the order of the data continues there.
        done: phase -> finished steps.
        broken, cut: phase -> rows that could not be used (with the reason), and rows cut at max_length.
        seconds: phase -> time spent in its steps.
        working: phase -> time within its steps alone: no waiting for batches, no held-out loss, no checkpoints.
        seen: phase -> what its steps held, fields of `step.Counts`.
        phases: phase -> facts for the manifest.
    """

    phase: str = ""
    step: int = 0
    position: int = 0
    done: dict[str, int] = field(default_factory=dict)
    broken: dict[str, dict[str, str]] = field(default_factory=dict)
    cut: dict[str, list[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    working: dict[str, float] = field(default_factory=dict)
    seen: dict[str, dict[str, int]] = field(default_factory=dict)
    phases: dict[str, dict[str, Any]] = field(default_factory=dict)


def work(job: Job) -> dict[str, Any]:
    """All of it. An error that no restart can mend is returned, not raised: Ray would try again."""
    torch.set_num_threads(max(1, int(job.config.cpus_per_worker)))
    torch.set_flush_denormal(True)  # tiny gradients make most CPUs a hundred times slower
    quiet()
    # Ray Train names this logger by its file, so that its own log level does not reach it.
    logging.getLogger(ray_train_context.__file__).setLevel(logging.WARNING)
    run: Run | None = None
    try:
        run = Run(job)
        return run.train()
    except (UserError, WorkFailed) as error:
        return {"error": type(error).__name__, "message": str(error)}
    except OSError as error:
        known = explained(error, job.output)
        if known is None or (run is not None and run.workers > 1):
            raise  # the others wait for this one: Ray ends them
        return {"error": "WorkFailed" if isinstance(known, WorkFailed) else "UserError", "message": str(known)}
    except torch.OutOfMemoryError:
        if run is not None and (run.leave_smaller() or run.workers > 1):
            raise  # Ray ends all workers and starts them again: nobody waits for this one
        return {"error": "WorkFailed", "message": fitting.TOO_LARGE}


class Run:
    """One worker's walk through the phases."""

    def __init__(self, job: Job) -> None:
        self.job, self.config = job, job.config
        context = ray.train.get_context()
        self.rank, self.workers = context.get_world_rank(), context.get_world_size()
        self.device = get_device()
        self.processor = load_processor(job.model)
        self.state = State()
        self.trained: dict[str, torch.Tensor] = {}
        self.method = Method()
        self.compiled: Compiled | None = None
        self.stepping: PhaseConfig | None = None  # the phase within whose steps this worker is
        self.automatic: dict[str, int] = {}
        self.held_out_features: FeatureCache | None = None
        self._check_targets()
        self.longest = min(self.config.max_length, room(load_config(job.model), self.config))
        self.templates = Templates(
            self.processor, self.longest, self.config.align.template, self.config.instruct.template
        )
        limit = self.config.max_broken_share
        self.rows = {
            name: read_rows(path, without=rows_of(self.config.without, path, WITHOUT)).require_usable(limit)
            for name, path in job.data.items()
        }
        instructions = self.rows.get("instruct")
        self.held_out = None if instructions is None else set_aside(instructions, self.config.held_out)

    def _check_targets(self) -> None:
        """Find a wrong `target_modules` now, on a model without weights, and not after hours of alignment."""
        learns = any("language_model" in (self.config.phase(name).learn or ()) for name in self.job.data)
        if learns and self.config.method not in ("full", "prefix"):
            lora_targets(load_skeleton(self.job.model), self.config.lora.target_modules)

    def train(self) -> dict[str, Any]:
        """All phases; returns the facts for the manifest."""
        checkpoint = ray.train.get_checkpoint()  # of this start
        if checkpoint is None and self.job.since is not None:
            checkpoint = ray.train.Checkpoint.from_directory(self.job.since)
        if checkpoint is None:
            return self._phases(None)
        with checkpoint.as_directory() as directory:
            self._restore(Path(directory))
            return self._phases(Path(directory))

    def _phases(self, checkpoint: Path | None) -> dict[str, Any]:
        tracker = self._tracker()
        log = TrainLog(Path(self.job.output), self.state.done, tracker) if self.rank == 0 else None
        self.gauges = TrainGauges(self.job.what)
        names = list(self.job.data)
        resumed = self.state.phase
        left = names[names.index(resumed) if resumed else 0 :]
        self.loaders = {name: self._loader(name, self.rows[name], name) for name in left}
        with log or nullcontext():
            for name in left:
                self._examine(name)
            for name in left:
                self._phase(name, log, checkpoint if name == resumed else None)
        if log is not None:
            write_adapter(Path(self.job.output), self.trained, self.method.peft_config, base=self.job.base)
        return vars(self.state)

    def _tracker(self) -> Tracker | None:
        """The first worker's; what it has against it ends all of them."""
        if self.config.tracker == "none":
            return None
        tracker, refusal = None, [""]
        if self.rank == 0:
            output, arm = Path(self.job.output), self.job.what.removeprefix("train").strip()
            name = f"{output.parents[1].name}/{arm}" if arm else output.name
            settings = {"model": self.job.model, "data": self.job.data, "train": asdict(self.config)}
            try:
                tracker = Tracker(self.config.tracker, output, name, settings, self.job.tracker)
            except UserError as error:
                refusal = [str(error)]
        if self.workers > 1:
            dist.broadcast_object_list(refusal, src=0)
        if refusal[0]:
            raise UserError(refusal[0])
        return tracker

    def _loader(self, name: str, rows: Rows, template: str) -> Loader:
        """Batches of rows as a phase takes them, in its own template or the other phase's."""
        phase = self._fitting(name)
        return Loader(
            rows,
            getattr(self.templates, template),
            self.processor.image_processor.resize,
            Sampler(len(rows), self.config.seed, name),
            Share(self.rank, self.workers, int(phase.micro_batch), phase.accumulation),
            _pad_token_id(self.processor.tokenizer),
            # while a card computes, its worker's own processors have nothing else to do
            max(int(self.config.cpus_per_worker), _CARD_THREADS if self.config.use_gpu else 1),
        )

    def _examine(self, name: str) -> None:
        """Tokenize every row that a phase will show before anything trains, a share of them on each worker: say which
        are cut, and refuse too many that cannot be used. A checkpoint knows both already.
        """
        loader, rows, steps = self.loaders[name], self.rows[name], self.config.phase(name).steps
        rows.broken.update(self.state.broken.get(name, {}))
        if name in self.state.cut:
            return
        self.templates.cut = set()
        shown = sorted(set(loader.sampler.at(0, steps * loader.share.per_step)))
        loader.examine(shown[self.rank :: self.workers])
        self._gather_broken(name, rows)
        unusable = sum(rows.rows[index].name in rows.broken for index in shown)
        rows.foresee(unusable / max(len(shown), 1)).require_usable(self.config.max_broken_share)
        if self.rank == 0:
            say_broken(rows.broken, name, self.job.what)
            if cut := self.state.cut[name]:
                of = "train.max_length" if self.longest == self.config.max_length else "the model's context"
                where = f"at {self.longest} tokens, {of}"
                say(f"{self.job.what}: {len(cut)} row(s) of {name} are cut {where}, e.g. {cut[0]}")

    def _phase(self, name: str, log: TrainLog | None, checkpoint: Path | None) -> None:
        """One phase to its end."""
        phase = self._fitting(name)
        if checkpoint is None:
            self.state.phase, self.state.step, self.state.position = name, 0, 0
        model, method = self._model(phase)
        rows, loader = self.rows[name], self.loaders.pop(name)
        share = loader.share
        held_out = self._loader(name, self.held_out, "instruct") if self.held_out else None
        self.templates.cut = set(self.state.cut[name])
        if self.state.step < phase.steps:
            self._cache_features(name, model, loader, self.state.position - self.state.step * share.per_step)
            if held_out is not None:
                self._cache_held_out(model, held_out, loader)
        engine = self._engine(model, phase, method)
        if checkpoint is not None:
            engine.load(checkpoint)
        self.state.phases[name] = {
            "steps": phase.steps,
            "batch": share.per_step,
            "rows": rows.total,
            "held_out": len(self.held_out) if self.held_out else 0,
            "template": self.templates.names[name],
            "cached_images": len(loader.features.slots) if loader.features is not None else 0,
        }
        self._gather_broken(name, rows)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._steps(name, phase, engine, loader, [] if held_out is None else held_out.every_row(), log)
        self.state.phases[name] |= self._facts(name, engine, model)
        if log is not None:
            self.state.phases[name]["stability"] = log.stability(name)
        self.trained.update(engine.weights())
        engine.close()
        del engine, model
        gc.collect()

    def _fitting(self, name: str) -> PhaseConfig:
        """A phase's settings, with the micro-batch that an earlier start found out to fit."""
        phase = self.config.phase(name)
        if phase.micro_batch == AUTO:
            phase = phase.settled(name, self.workers, self._automatic(name))
        fits = fitting.noted(Path(self.job.output)).get(name, int(phase.micro_batch))
        if fits == 0:
            raise WorkFailed(fitting.TOO_LARGE)
        smaller = fits < int(phase.micro_batch) and phase.per_step(self.workers) % (self.workers * fits) == 0
        return phase.settled(name, self.workers, fits) if smaller else phase

    def _automatic(self, name: str) -> int:
        """The micro-batch that fits the smallest of the workers' cards, by their longest row; decided once."""
        if name not in self.automatic:
            shape = load_config(self.job.model)
            encode, ids = getattr(self.templates, name), (shape.num_image_tokens, shape.image_token_id)
            row = forecast.longest_of(self.rows[name].rows, encode, *ids)
            phase = forecast.Phase(shape, self.config, name)
            own = forecast.fitting(phase, row or forecast.longest_possible(shape, self.config), forecast.card()[1])
            self.automatic[name] = self._least(own)
            if self.automatic[name] == 0:
                raise WorkFailed(fitting.TOO_LARGE)
            if self.rank == 0:
                say(f"{self.job.what}: {name} with micro-batches of {self.automatic[name]}")
        return self.automatic[name]

    def _least(self, number: int) -> int:
        """The smallest of all workers' numbers."""
        return int(min(self._everyones(number)))

    def _everyones(self, own: Any) -> list[Any]:
        """What every worker has."""
        found = [own] * self.workers
        if self.workers > 1:
            dist.all_gather_object(found, own)
        return found

    def leave_smaller(self) -> bool:
        """After an out of memory that cannot be mended here, leave a smaller micro-batch to those who start again.

        From within a step only DeepSpeed's engine gets here; whatever else is too large is so at any micro-batch. When
        several workers fail together, each leaves the same: half of what they all ran with.
        """
        name, output, fits = self.state.phase, Path(self.job.output), 0
        if self.stepping is not None and self.config.strategy != "ddp":
            with suppress(WorkFailed):
                fits = fitting.halved(int(self.stepping.micro_batch))
        if fits and fitting.noted(output).get(name) != fits:
            self._say_smaller(name, fits)
        fitting.note(output, name, fits)
        return bool(fits)

    def _say_smaller(self, name: str, micro_batch: int) -> None:
        batch = self.state.phases[name]["batch"]
        passes = batch // (self.workers * micro_batch)
        say(
            f"{self.job.what}: out of memory in {name}; going on with micro-batches of {micro_batch}, {passes} a step "
            f"(the same {batch} samples a step)"
        )

    def _model(self, phase: PhaseConfig) -> tuple[Any, Method]:
        """The base model with this phase's trainable weights in it, as far as they have been trained."""
        packed = quantization(self.config)
        model = load_model(
            self.job.model,
            "float32" if self.config.precision == "float32" else "auto",
            self.device if packed else "cpu",
            **({"quantization_config": packed} if packed else {}),
        )
        method = make_learn(model, phase, self.config)
        if method.peft_config is not None:
            self.method = method
            method.peft_config.base_model_name_or_path = self.job.model
        with torch.no_grad():
            own = dict(model.named_parameters())
            for key, tensor in self.trained.items():
                if key in own:
                    own[key].copy_(tensor)
        prepare(model, self.config.gradient_checkpointing)
        if not packed:
            model.to(self.device)  # type: ignore[arg-type]
        wanted = self.config.compile
        if wanted or (wanted is None and self.device.type == "cuda" and self.config.strategy == "ddp"):
            self.compiled = Compiled(compile_layers(model), self.job.what if self.rank == 0 else None)
        return model, method

    def _engine(self, model: Any, phase: PhaseConfig, method: Method) -> Engine:
        forward = TrainForward(model, self.processor.image_processor.normalize, method)
        if self.config.strategy == "ddp":
            return TorchEngine(forward, phase, self.config.precision, self.device)
        from pipelines.train.zero import ZeroEngine

        return ZeroEngine(forward, int(self.config.strategy[-1]), phase, self.config.precision, self.device)

    def _cache_features(self, name: str, model: Any, loader: Loader, start: int) -> None:
        """Encode every image of the phase once, when the features fit into the memory given to them.

        From the phase's first step, also after a restart: the same images in the same groups give the same bits.
        """
        shown = partial(loader.images, max(start, 0), getattr(self.config, name).steps)
        what = f"{self.job.what}: {name} images"
        loader.features = self._features(model, loader, shown, self.config.feature_cache_mb << 20, what)

    def _cache_held_out(self, model: Any, held_out: Loader, loader: Loader) -> None:
        """Likewise the held-out images, in what the phase's leave of that memory; once for both phases."""
        if self.held_out_features is None:
            left = (self.config.feature_cache_mb << 20) - (loader.features.bytes if loader.features else 0)
            self.held_out_features = self._features(model, held_out, held_out.every_image, left)
        held_out.features = self.held_out_features

    def _features(
        self, model: Any, loader: Loader, shown: Callable[..., list[Any]], limit_bytes: int, what: str = ""
    ) -> FeatureCache | None:
        if self.config.feature_cache_mb == 0:
            return None
        return fill(
            model.model,
            self.processor.image_processor.normalize,
            loader,
            shown,
            limit_bytes,
            autocast(self.device, self.config.precision),
            (lambda images: Progress(images, what, "images")) if what and self.rank == 0 else None,
        )

    def _steps(
        self,
        name: str,
        phase: PhaseConfig,
        engine: Engine,
        loader: Loader,
        held_out: list[Batch],
        log: TrainLog | None,
    ) -> None:
        """From the current step to the phase's last, with log lines and checkpoints."""
        state, seen, cut = self.state, 0, None
        counts = Counts(**state.seen.get(name, {}))
        self.stepping = phase
        before = state.seconds.get(name, 0.0)
        started = last = time.monotonic()
        for batches in loader.steps(state.position, phase.steps - state.step):
            rate = learning_rate(phase, state.step)
            began = time.monotonic()
            result = self._step(engine, batches, rate)
            state.working[name] = round(state.working.get(name, 0.0) + time.monotonic() - began, 3)
            state.step += 1
            state.position += loader.share.per_step
            seen += result.counts.samples
            counts += result.counts
            state.seen[name] = asdict(counts)
            if engine.cut is not None and engine.cut != cut and self.rank == 0:
                fitting.note(Path(self.job.output), name, cut := engine.cut)
                self._say_smaller(name, cut)
            now = time.monotonic()
            state.seconds[name] = round(before + now - started, 3)
            due = state.step % self.config.held_out_every == 0 or state.step in (1, phase.steps)
            measured = {"held_out_loss": engine.evaluate(held_out)} if held_out and due else {}
            if log is not None and (measured or state.step % self.config.log_every == 0 or state.step == phase.steps):
                line = {"phase": name, "step": state.step, "loss": result.loss, "grad_norm": result.grad_norm}
                line |= {"clipped": result.grad_norm > phase.max_grad_norm, "learning_rate": rate}
                line |= engine.method.figures()
                speed = {"samples_per_second": round(seen / (now - last), 3), "seconds": state.seconds[name]}
                peak = {"peak_memory_gib": round(peak_bytes(self.device) / GIB, 3)}
                log.write(line := line | speed | peak | measured)
                self.gauges.show(line, phase.steps)
                last, seen = time.monotonic(), 0
            if state.step % self.config.checkpoint_every == 0 or state.step == phase.steps:
                state.done[name] = state.step
                self._gather_broken(name, loader.rows)
                self._checkpoint(engine, {"phase": name, "step": state.step, "loss": result.loss})
        self.stepping = None

    def _step(self, engine: Engine, batches: list[Batch], rate: float) -> StepResult:
        def start() -> None:
            for parameter in engine.named.values():
                parameter.grad = None

        def take() -> StepResult:
            return engine.step(batches, rate)

        start()
        compiled, self.compiled = self.compiled, None
        return take() if compiled is None else compiled.first_step(take, start)

    def _facts(self, name: str, engine: Engine, model: Any) -> dict[str, Any]:
        """What a phase came to, for the manifest; its rates are of the time within its steps, `mfu` of the cards' bf16
        peak (null where that is not known).
        """
        trainable = sum(parameter_count(parameter) for parameter in engine.named.values())
        parameters = sum(parameter_count(parameter) for parameter in model.parameters())
        seconds = self.state.working.get(name) or None
        counts, peak = Counts(**self.state.seen.get(name, {})), peak_flops(self.device)
        used = step_flops(model, counts) / (seconds * self.workers * peak) if seconds and peak else None
        return {
            "micro_batch": engine.cut or int(self._fitting(name).micro_batch),
            "trainable_parameters": trainable,
            "parameters": parameters,
            "trainable_share": round(trainable / parameters, 6),
            "peak_memory_gib": round(peak_bytes(self.device) / GIB, 3),
            "samples_per_second": round(counts.samples / seconds, 3) if seconds else None,
            "tokens_per_second": round(counts.tokens / seconds, 1) if seconds else None,
            "mfu": None if used is None else round(used, 4),
        }

    def _gather_broken(self, name: str, rows: Rows) -> None:
        """Workers see different rows; the state holds what any of them found. Too many stop all of them at once."""
        found = self._everyones((rows.broken, sorted(self.templates.cut)))
        self.state.broken[name] = {row: reason for broken, _ in found for row, reason in sorted(broken.items())}
        self.state.cut[name] = sorted({row for _, cut in found for row in cut})
        rows.broken.update(self.state.broken[name])
        rows.require_usable(self.config.max_broken_share)

    def _checkpoint(self, engine: Engine, metrics: dict[str, Any]) -> None:
        """Report a checkpoint that holds what was trained and nothing of the base model."""
        from safetensors.torch import save_file

        weights = engine.weights()
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch)
            engine.save(directory)
            if self.rank == 0:
                save_file({**self.trained, **weights}, directory / TRAINED)
                (directory / STATE).write_text(json.dumps(vars(self.state)))
            files = self._everyones(checkpoints.sizes(directory))
            if self.rank == 0:
                checkpoints.vouch(directory, {name: size for own in files for name, size in own.items()})
            checkpoint = ray.train.Checkpoint.from_directory(directory) if any(directory.iterdir()) else None
            ray.train.report(metrics, checkpoint=checkpoint)

    def _restore(self, directory: Path) -> None:
        from safetensors.torch import load_file

        self.state = State(**json.loads((directory / STATE).read_text()))
        self.trained = load_file(directory / TRAINED)
        learned = {group_of(name) for name in self.trained}
        if "language_model" in (self.config.phase(self.state.phase).learn or ()) and "language_model" not in learned:
            raise WorkFailed(f"checkpoint of phase {self.state.phase} does not hold that phase's weights")


def room(model: MGMConfig, config: TrainConfig) -> int:
    """Longest row that the model's context has room for."""
    context = getattr(model.text_config, "max_position_embeddings", None) or config.max_length
    return int(context) - (config.prefix.tokens if config.method == "prefix" else 0)


def _pad_token_id(tokenizer: Any) -> int:
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
