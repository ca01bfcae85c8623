"""The train stage on Ray Train: start the workers, watch their log, leave an adapter and its manifest."""

from __future__ import annotations

import dataclasses
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines import groups
from pipelines.connection import connect
from pipelines.errors import UserError, WorkFailed
from pipelines.failures import explained
from pipelines.formats import open_dataset
from pipelines.manifest import MANIFEST, claim_of, look, open_stage
from pipelines.mgm.directory import check_plain_directory
from pipelines.modelfiles import model_identity
from pipelines.overlapping import identity_of_rows, rows_of
from pipelines.progress import Progress, say
from pipelines.storage import is_remote
from pipelines.train import checkpoints
from pipelines.train.config import WITHOUT, PhaseConfig, TrainConfig
from pipelines.train.held_out import most
from pipelines.train.job import Job, train_worker
from pipelines.train.log import drop_after
from pipelines.train.rows import read_rows, say_broken
from pipelines.train.stability import Stability
from pipelines.train.trackers import environment, require

_NOT_RESULT = (
    "model",
    "instruct_data",
    "workers",
    "cpus_per_worker",
    "use_gpu",
    "compile",
    "max_failures",
    "log_every",
    "held_out_every",
    "tracker",
    "checkpoint_every",
    "feature_cache_mb",
    "max_broken_share",
)
"""Settings that say where and how fast, not what: a run may be continued with others."""


def run(
    input: Path | str,
    model: Path | str,
    output: Path | str,
    config: TrainConfig,
    *,
    arm: str = "",
    restart: bool = False,
) -> dict[str, Any]:
    """Train projector and LoRA on `input` (and `config.instruct_data`); continues what a kill left unfinished.

    Returns:
        The manifest.

    Raises:
        UserError: an impossible input, model or setting.
        WorkFailed: training itself failed.
    """
    model, output = Path(model).resolve(), Path(output).resolve()
    data = phases(input, config)
    check_plain_directory(model)
    require(config.tracker)
    config = config if restart else as_first_started(config, output)
    identities = {phase: open_dataset(path).identity() for phase, path in data.items()}
    wanted = inputs(model_identity(model), identities, config)
    what = f"train {arm}".strip()
    if restart or not look(output, "train", wanted).complete:
        config = _with_steps(config, _look_at_rows(data, config, what))
    stage = open_stage(output, "train", wanted, restart=restart, notes={"workers": config.workers})
    if stage.complete:
        return stage.manifest
    since = _since(output, {phase: config.phase(phase).steps for phase in data}, what) if stage.resumed else None
    verb = "starting" if since is None else "continuing"
    say(f"{what}: {verb} with {config.workers} worker(s), {config.strategy}")
    facts = _fit(model, stage.inputs["model"], output, config.settled(), data, what, since)
    for phase, broken in facts["broken"].items():
        say_broken(broken, phase, what)
    for phase, found in facts["phases"].items():
        say(f"{what}: {phase} was {Stability(**found['stability']).verdict}")
    return stage.finish(
        rows_in={phase: found["rows"] for phase, found in facts["phases"].items()},
        rows_broken={phase: len(broken) for phase, broken in facts["broken"].items()},
        rows_cut={phase: len(cut) for phase, cut in facts["cut"].items()},
        broken={phase: dict(list(broken.items())[:100]) for phase, broken in facts["broken"].items()},
        phases=facts["phases"],
        training_seconds=facts["seconds"],
        workers=config.workers,
        seed=config.seed,
    )


def wanted(
    input: Path | str, model: Path | str, output: Path | str, config: TrainConfig, *, restart: bool = False
) -> dict[str, Any]:
    """The inputs of a run with these arguments."""
    config = config if restart else as_first_started(config, Path(output))
    identities = {phase: open_dataset(path).identity() for phase, path in phases(input, config).items()}
    return inputs(model_identity(model), identities, config)


def as_first_started(config: TrainConfig, output: Path) -> TrainConfig:
    """The settings by which a run in `output` goes on where nothing but `workers` has changed: with the samples a step
    of its first start, which then take more or fewer forward passes. Where it is done, with its own workers.

    Raises:
        UserError: no number of forward passes makes up that batch, or the state is sharded over other workers.
    """
    claim = claim_of(output, "train")
    first = claim.get("notes", {}).get("workers", config.workers)
    if first == config.workers:
        return config
    if (output / MANIFEST).exists():
        return dataclasses.replace(config, workers=first)
    if config.strategy != "ddp":
        raise UserError(
            f"{output}: train.workers is {config.workers}, but the {config.strategy} state of this run is sharded over "
            f"{first}; continue with train.workers {first}, or pass --restart"
        )
    kept = {}
    for name in ("align", "instruct"):
        phase: PhaseConfig = getattr(config, name)
        batch = claim["inputs"]["config"][name]["batch"]
        if phase.batch is None and phase.per_step(first) == batch:
            kept[name] = dataclasses.replace(phase, batch=batch)
    return dataclasses.replace(config, **kept)  # type: ignore[arg-type]


def inputs(model: str, data: dict[str, str], config: TrainConfig) -> dict[str, Any]:
    """Everything that decides the adapter, with the identities of the model and of each phase's data.

    Of a step's micro-batches only their sum: however a batch is spread over workers and forward passes, it is the same.
    """
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in (*_NOT_RESULT, "without")}
    if config.without:
        settings["without"] = identity_of_rows(config.without, WITHOUT)
    for name in ("align", "instruct"):
        phase = {k: v for k, v in settings[name].items() if k not in ("micro_batch", "accumulation")}
        settings[name] = phase | {"batch": getattr(config, name).per_step(config.workers)}
    return {"config": settings, "model": model, "data": data}


def phases(input: Path | str, config: TrainConfig) -> dict[str, str]:
    """Phase -> its data, for the phases that have steps."""
    data = {}
    if config.runs("align"):
        data["align"] = _absolute(input)
    if config.runs("instruct"):
        assert config.instruct_data is not None
        data["instruct"] = _absolute(config.instruct_data)
    if not data:
        raise UserError(
            "train.align.steps is 0 and there is no instruct phase (train.instruct.steps, train.instruct_data)"
        )
    return data


def _absolute(path: Path | str) -> str:
    """As the workers, which start elsewhere, must be told it."""
    return str(path) if is_remote(path) else str(Path(path).absolute())


def _look_at_rows(data: dict[str, str], config: TrainConfig, what: str) -> dict[str, int]:
    """Read every phase's rows before anything is claimed or started: say how many are broken, refuse too many.

    Returns:
        Phase -> rows that an epoch has.
    """
    found = {}
    for phase, path in data.items():
        rows = read_rows(path, images=False, without=rows_of(config.without, path, WITHOUT))
        if rows.left_out:
            say(f"{what}: {rows.left_out} row(s) of {phase} are left out, because they show a benchmark's picture")
        found[phase] = len(rows) - (most(rows, config.held_out) if phase == "instruct" else 0)
        rows.look_at_images()
        say_broken(rows.require_usable(config.max_broken_share).broken, phase, what)
    return found


def _with_steps(config: TrainConfig, rows: dict[str, int]) -> TrainConfig:
    """With the steps of the phases that are counted in epochs."""
    phases = {}
    for name, count in rows.items():
        phase: PhaseConfig = getattr(config, name)
        if phase.epochs is not None:
            steps = math.ceil(phase.epochs * count / phase.per_step(config.workers))
            phases[name] = dataclasses.replace(phase, steps=steps)
    return dataclasses.replace(config, **phases)  # type: ignore[arg-type]


def _since(output: Path, steps: dict[str, int], what: str) -> Path | None:
    """The checkpoint that an earlier start left whole. What is behind it is dropped: it will be done again."""
    checkpoint = checkpoints.newest(output)
    checkpoints.clear_all_but(output, checkpoint)
    done = checkpoints.done_steps(checkpoint)
    lost = drop_after(output, done)
    if checkpoint is None:
        say(f"{what}: an earlier start reached no checkpoint")
    else:
        again = f"; {lost} logged step(s) after it are done again" if lost else ""
        say(f"{what}: the last checkpoint is at step {sum(done.values())} of {sum(steps.values())}{again}")
    return checkpoint


def _fit(
    model: Path, base: str, output: Path, config: TrainConfig, data: dict[str, str], what: str, since: Path | None
) -> dict[str, Any]:
    """Run the workers to the end and return what the first one found out."""
    connect()
    import ray
    from ray.train.torch import TorchConfig
    from ray.train.v2.api.config import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    from pipelines.train.fitting import try_again

    try_again(output)
    _tune_ray_train(nodes=len(ray.nodes()))
    resources: dict[str, float] = {"CPU": config.cpus_per_worker} | ({"GPU": 1} if config.use_gpu else {})
    job = Job(str(model), base, str(output), config, data, what, environment(), str(since) if since else None)
    trainer = TorchTrainer(
        train_worker,  # type: ignore[arg-type]
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if config.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            use_gpu=config.use_gpu,
            resources_per_worker=resources,
            label_selector=groups.selector(config.demand().group) or None,
        ),
        run_config=RunConfig(
            name=checkpoints.RUN,
            storage_path=str(checkpoints.directory_of(output).parent),
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    with _cluster_in_environment(), _Watch(output, {phase: getattr(config, phase).steps for phase in data}, what):
        try:
            facts: dict[str, Any] | None = _beside(trainer.fit).return_value
        except TrainingFailedError as error:
            if known := explained(error, output, "train.align.micro_batch, train.instruct.micro_batch"):
                raise known from error
            raise WorkFailed(f"{what}: the workers failed {config.max_failures + 1} time(s): {error}") from error
    if facts is None:
        raise WorkFailed(f"{what}: the first worker returned nothing")
    if "error" in facts:
        raise {"UserError": UserError, "WorkFailed": WorkFailed}[facts["error"]](facts["message"])
    return facts


_turn = threading.Lock()
_told: list[str] = []
"""The address, once for each training of this process that is at work."""


@contextmanager
def _cluster_in_environment() -> Iterator[None]:
    """RAY_ADDRESS for Ray Train's own actors: they look for their cluster anew, and two may run here."""
    import ray
    from ray.train.v2._internal import constants

    constants.ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")
    with _turn:
        ours = bool(_told) or "RAY_ADDRESS" not in os.environ
        if ours:
            _told.append(ray.get_runtime_context().gcs_address)
            os.environ["RAY_ADDRESS"] = _told[0]
    try:
        yield
    finally:
        with _turn:
            if ours:
                _told.pop()
                if not _told:
                    del os.environ["RAY_ADDRESS"]


def _beside(work: Callable[[], Any]) -> Any:
    """The result of `work()`, done in a thread of its own: in the main one Ray Train takes Ctrl-C for itself and ends
    the process with status 0, as if all were done.
    """
    result: Future[Any] = Future()

    def do() -> None:
        try:
            result.set_result(work())
        except BaseException as error:  # whatever it is, it is raised where the result is awaited
            result.set_exception(error)

    threading.Thread(target=do, daemon=True, name="train").start()
    return result.result()


def _tune_ray_train(nodes: int) -> None:
    """Ray Train's switches are environment variables; whoever set one keeps it."""
    # How often the controller looks at its workers; the default of 2 s adds seconds to a short run.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # Importing torch and transformers on a busy small machine can take longer than the default minute.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    # A worker's `print` would go through Ray Train's logger, which says every line twice.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    if nodes == 1:  # a preemption takes the only node, the watcher and the controller alike
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")


class _Watch:
    """Turns the workers' log into a progress line on the driver, which is what the person looks at."""

    def __init__(self, output: Path, steps: dict[str, int], what: str) -> None:
        self.output, self.steps = output, steps
        self.progress = Progress(sum(steps.values()), what, "steps")
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True, name="train-progress")

    def __enter__(self) -> _Watch:
        self.progress.start_at(self._look()[0])
        self.thread.start()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.stop.set()
        self.thread.join()
        self._tell()
        self.progress.__exit__(kind, error, trace)

    def _follow(self) -> None:
        while not self.stop.wait(0.5):
            self._tell()

    def _tell(self) -> None:
        done, notes = self._look()
        if done >= self.progress.done:
            self.progress.update(done - self.progress.done, notes)
        else:  # a worker died and its successor does the steps since the last checkpoint again
            self.progress.start_at(done)

    def _look(self) -> tuple[int, str]:
        """Steps done over all phases and a live figure, from the end of the log."""
        import json

        path = self.output / "log.jsonl"
        if not path.exists():
            return 0, "starting workers"
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - 4096))
            lines = [
                line
                for line in stream.read().decode(errors="replace").splitlines(keepends=True)
                if line.endswith("}\n")
            ]
        if not lines:
            return 0, "starting workers"
        last = json.loads(lines[-1])
        names = list(self.steps)
        before = sum(self.steps[name] for name in names[: names.index(last["phase"])])
        return before + last["step"], f"{last['phase']}, loss {last['loss']:.3g}"
