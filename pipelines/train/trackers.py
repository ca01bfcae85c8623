"""`train.tracker`: the lines of the training log in MLflow or Weights & Biases, too.

Where a tracker is and who may write there, its own environment variables say (`MLFLOW_TRACKING_URI`, `WANDB_API_KEY`,
...), those of the command: the worker that writes the log gets them from there. What is lost on the way stays in
`log.jsonl` and is sent again: a tracker that cannot be reached must not end a training of days.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from pipelines.errors import UserError
from pipelines.files import write_text
from pipelines.progress import say

TRACKER = "tracker.json"
_AGAIN_AFTER = 300.0  # seconds from a failure to the next try
_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # its own 7, with growing pauses, would hold up a step for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # nobody asked for reports to third parties
    "WANDB_PROJECT": "captune",
    "WANDB_SILENT": "true",
}


class Service(Protocol):
    """A tracker's client, writing to one run of it."""

    run: str

    def log(self, step: int, values: dict[str, float]) -> None:
        """Values of one step, named `PHASE/what`."""

    def note(self, key: str, text: str) -> None:
        """A remark about the run."""

    def close(self, failed: bool) -> None:
        """The run has ended."""


class Mlflow:
    """A run of MLflow's experiment `MLFLOW_EXPERIMENT_NAME`, else `captune`."""

    def __init__(self, run: str | None, name: str, settings: dict[str, Any], place: Path) -> None:
        from mlflow.tracking import MlflowClient

        self.client = MlflowClient()
        if run is not None:
            self.run = run
            self.client.update_run(run, status="RUNNING")
            return
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "captune")
        found = self.client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self.client.create_experiment(experiment)
        self.run = self.client.create_run(number, run_name=name, tags={"captune.output": str(place)}).info.run_id
        for key, value in _flat(settings).items():
            self.client.log_param(self.run, key, value)

    def log(self, step: int, values: dict[str, float]) -> None:
        """See `Service.log`."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self.client.log_batch(self.run, metrics=[Metric(key, value, now, step) for key, value in values.items()])

    def note(self, key: str, text: str) -> None:
        """See `Service.note`."""
        self.client.set_tag(self.run, key, text)

    def close(self, failed: bool) -> None:
        """See `Service.close`."""
        self.client.set_terminated(self.run, "FAILED" if failed else "FINISHED")


class Wandb:
    """A run of the project `WANDB_PROJECT`, else `captune`."""

    def __init__(self, run: str | None, name: str, settings: dict[str, Any], place: Path) -> None:
        import wandb

        known = {"id": run, "resume": "allow"} if run is not None else {"config": settings}
        self._run = wandb.init(name=name, dir=str(place), **known)
        self.run = self._run.id
        for phase in ("align", "instruct"):  # both count their steps from 1
            self._run.define_metric(f"{phase}/step", hidden=True)
            self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")

    def log(self, step: int, values: dict[str, float]) -> None:
        """See `Service.log`."""
        phase = next(iter(values)).partition("/")[0]
        self._run.log({f"{phase}/step": step, **values})

    def note(self, key: str, text: str) -> None:
        """See `Service.note`."""
        self._run.summary[key] = text

    def close(self, failed: bool) -> None:
        """See `Service.close`."""
        self._run.finish(exit_code=int(failed))


SERVICES: dict[str, type[Mlflow] | type[Wandb]] = {"mlflow": Mlflow, "wandb": Wandb}


def require(name: str) -> None:
    """Raise `UserError` when a tracker cannot be used from here, as far as can be seen without asking it."""
    if name == "none":
        return
    if importlib.util.find_spec(name) is None:
        raise UserError(f"train.tracker: {name} is not installed; pip install 'captune[trackers]' brings it")
    if name == "mlflow" and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise UserError(
            "train.tracker: mlflow needs the environment variable MLFLOW_TRACKING_URI, e.g. http://host:5000"
        )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def environment() -> dict[str, str]:
    """What trackers are told by the environment of the command, for a worker that runs elsewhere."""
    found = {key: value for key, value in os.environ.items() if key.startswith(("MLFLOW_", "WANDB_"))}
    place = found.get("MLFLOW_TRACKING_URI", "")
    if place and "://" not in place and ":" not in place:  # a directory, relative to one that a worker does not share
        found["MLFLOW_TRACKING_URI"] = Path(place).absolute().as_uri()
    return found


class Tracker:
    """Sends log lines to a service, each once: `tracker.json` beside the log says whose run it is and what was sent,
    also after a restart.

    Raises:
        UserError: the service does not take the run; nothing has been trained by then.
    """

    def __init__(self, kind: str, directory: Path, name: str, settings: dict[str, Any], told: dict[str, str]) -> None:
        os.environ.update(_DEFAULTS | told)
        self.kind, self.path = kind, directory / TRACKER
        kept = json.loads(self.path.read_text()) if self.path.exists() else {}
        kept = kept if kept.get("tracker") == kind else {}
        self.sent: dict[str, int] = kept.get("sent", {})
        self.again = 0.0
        try:
            self.service: Service = SERVICES[kind](kept.get("run"), name, settings, directory)
        except Exception as error:  # of any of the many kinds that a client has
            raise UserError(f"train.tracker: {kind} refuses: {error}") from error
        self._keep()

    def send(self, lines: Sequence[dict[str, Any]]) -> None:
        """Those of the lines that it does not have yet."""
        for line in lines:
            phase, step = line["phase"], line["step"]
            if step <= self.sent.get(phase, 0):
                continue
            before = dict(self.sent)
            self.sent[phase] = step
            self._keep()  # first: a step that a kill loses is in the log; one that comes twice spoils the curve
            values = {f"{phase}/{key}": float(v) for key, v in line.items() if key not in ("phase", "step")}
            if not self._try(lambda step=step, values=values: self.service.log(step, values)):  # type: ignore[misc]
                self.sent = before
                self._keep()
                return

    def note(self, key: str, text: str) -> None:
        """A remark about the run."""
        self._try(lambda: self.service.note(key, text))

    def close(self, failed: bool) -> None:
        """The run has ended."""
        self.again = 0.0
        self._try(lambda: self.service.close(failed))

    def _keep(self) -> None:
        write_text(self.path, json.dumps({"tracker": self.kind, "run": self.service.run, "sent": self.sent}) + "\n")

    def _try(self, send: Callable[[], None]) -> bool:
        if time.monotonic() < self.again:
            return False
        try:
            send()
            return True
        except Exception as error:  # whatever it is: the log has the line, and training goes on
            self.again = time.monotonic() + _AGAIN_AFTER
            say(f"train.tracker: {self.kind} does not answer, its lines are sent later ({error})")
            return False
