"""What the driver and Ray Train's own actors know of a worker's work. They unpack it without importing torch's,
transformers' and PEFT's seconds of code, which the workers alone need: no such import at the top of this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipelines.train.config import TrainConfig


@dataclass
class Job:
    """What the driver tells every worker. `data` has a path per phase, in the order in which the phases run; `base` is
    the model's identity; `tracker` is what the tracker's client has to know; `since` is the checkpoint of an earlier
    start.
    """

    model: str
    base: str
    output: str
    config: TrainConfig
    data: dict[str, str]
    what: str
    tracker: dict[str, str]
    since: str | None = None


def train_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Ray Train's `train_loop_per_worker`."""
    from pipelines.train.worker import work

    return work(settings["job"])
