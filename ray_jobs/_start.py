"""Connecting to Ray: the cluster of `ray job submit` or RAY_ADDRESS when there is one, else a local one for this
process.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from pipelines.progress import say


@contextmanager
def ray_cluster() -> Iterator[None]:
    """Ray for the time of a command."""
    # Ray reads these when it is imported.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "WARNING")
    # A local cluster ends a worker process that was idle for a second, and the next short task waits for a new Python
    # to start.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "30000")
    import ray

    quiet_libraries()
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=True)
        say(f"ray: connected to {address}, {ray.cluster_resources().get('CPU', 0):g} CPUs")
    else:
        # Ray Train watches its controller through the dashboard's state API, and people like to look at it.
        context = ray.init(logging_level=logging.WARNING, log_to_driver=True, include_dashboard=True)
        say(
            f"ray: started here, {ray.cluster_resources().get('CPU', 0):g} CPUs, dashboard at "
            f"http://{context.dashboard_url}"
        )
    try:
        yield
    finally:
        ray.shutdown()


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
