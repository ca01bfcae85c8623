"""The curves of a running training for Prometheus: Ray exports them on the first worker's node, with `ray_` before each
name.
"""

from __future__ import annotations

from typing import Any

from ray.util.metrics import Gauge

GAUGES = {
    "loss": ("captune_train_loss", "Mean loss of the logged steps."),
    "grad_norm": ("captune_train_grad_norm", "Norm of the gradients before clipping."),
    "learning_rate": ("captune_train_learning_rate", "Learning rate."),
    "samples_per_second": ("captune_train_samples_per_second", "Samples per second over all workers."),
    "step": ("captune_train_step", "Optimizer steps of the phase that are done."),
    "steps": ("captune_train_steps", "Optimizer steps that the phase will have."),
}
"""Field of a log line -> name and meaning."""


class TrainGauges:
    """Gauges of one training; `run` (as in `train enhanced`) and the phase are their labels."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges = {field: Gauge(name, about, tag_keys=("run", "phase")) for field, (name, about) in GAUGES.items()}

    def show(self, line: dict[str, Any], steps: int) -> None:
        """Set them to a line of the training log."""
        tags = {"run": self._run, "phase": line["phase"]}
        for field, gauge in self._gauges.items():
            gauge.set(float((line | {"steps": steps})[field]), tags=tags)
