"""Connecting to Ray: the cluster of `ray job submit` or RAY_ADDRESS when there is one, else a local one for this
process.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pipelines import cluster, connection, preflight
from pipelines.caption.config import CaptionConfig
from pipelines.demand import Demand
from pipelines.errors import Problem, WorkFailed
from pipelines.progress import say

_ours = threading.Event()
"""The connection was made here, so it ends here: with the outermost of the commands' blocks."""
_around: list[partial[None]] = []


def lacking(caption: CaptionConfig | None = None, demands: Sequence[Demand] = ()) -> Iterator[Problem]:
    """What this machine lacks for a command, when `ray_cluster` would start Ray on it; a cluster is asked once
    connected.
    """
    ray = sys.modules.get("ray")
    if not address() and not (ray and ray.is_initialized()):
        yield from preflight.here(caption, demands)


@contextmanager
def ray_cluster(caption: CaptionConfig | None = None, demands: Sequence[Demand] = ()) -> Iterator[None]:
    """Ray for the time of a command that captions so, and otherwise demands so much of it: connected by the first stage
    that has work (`pipelines.connection`).

    Raises:
        NotReady: Ray would wait for ever, because the machine or cluster never has what is asked for.
    """
    preflight.require(lacking(caption, demands))
    start = partial(_connect, caption, demands)
    _around.append(start)
    try:
        with connection.when_needed(start):
            yield
    finally:
        _around.remove(start)
        if _ours.is_set() and not _around:
            import ray

            ray.shutdown()
            _ours.clear()


def _connect(caption: CaptionConfig | None, demands: Sequence[Demand]) -> None:
    """Start Ray or join a cluster, unless this process is connected already."""
    # Ray reads these when it is imported.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "WARNING")
    # A local cluster ends a worker process that was idle for a second, and the next short task waits for a new Python
    # to start.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "30000")
    import ray

    quiet_libraries()
    if not ray.is_initialized():
        at_sigterm = signal.getsignal(signal.SIGTERM)
        _join_or_start()
        _ours.set()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, at_sigterm)  # Ray has put its own in place, which ends with status 1
    cluster.require_room(caption, demands)


def _join_or_start() -> None:
    import ray

    running = address()
    # Ray Train watches its controller through the dashboard's state API, and people like to look at it.
    where: dict[str, Any] = {"address": running} if running else {"include_dashboard": True}
    try:
        context = ray.init(logging_level=logging.WARNING, log_to_driver=True, **where)
    except Exception as error:  # what Ray raises when a node does not come up in time is no more special than that
        raise WorkFailed(f"Ray {f'at {running}' if running else 'here'} did not answer: {error}") from error
    if running:
        say(f"ray: connected to {running}, {ray.cluster_resources().get('CPU', 0):g} CPUs")
        return
    cpus = ray.cluster_resources().get("CPU", 0)
    say(f"ray: started here, {cpus:g} CPUs, dashboard at http://{context.dashboard_url}")


def address() -> str:
    """Address of the cluster that Ray would connect to: RAY_ADDRESS, or one that `ray start` began on this machine."""
    if address := os.environ.get("RAY_ADDRESS"):
        return address
    started = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray" / "ray_current_cluster"
    return started.read_text().strip() if started.is_file() else ""


def quiet_libraries() -> None:
    """Progress is what a person watches; libraries speak up when something is wrong, and Ray's own logs keep the
    rest.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    for name in ("httpx", "ray.data", "ray.serve", "ray.train"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # What these say at every start is meant: Ray's token authentication stays on, and captune's own lines replace Ray's
    # bars.
    for name in ("ray._private.authentication.authentication_token_setup", "ray.data._internal.progress"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # A filter, because DeepSpeed sets its logger's level when it is imported.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
