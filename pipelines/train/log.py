"""The training log: `log.jsonl`, one line per logged step, and the same curves for TensorBoard.

After a restart the steps since the last checkpoint are done again. Their lines are dropped first and TensorBoard's
files are written anew from the lines that stay, so that no step ever appears twice.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pipelines.files import write_text

LOG = "log.jsonl"
TENSORBOARD = "tensorboard"
CURVES = ("loss", "grad_norm", "learning_rate", "samples_per_second")


class TrainLog:
    """Writes the log of one run; only the first worker has one.

    Args:
        done: phase -> steps that the checkpoint holds; later lines are dropped.
    """

    def __init__(self, directory: Path, done: dict[str, int]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = directory / LOG
        kept = [line for line in read_log(directory) if line["step"] <= done.get(line["phase"], 0)]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        shutil.rmtree(directory / TENSORBOARD, ignore_errors=True)
        self.writer = SummaryWriter(str(directory / TENSORBOARD))
        for line in kept:
            self._curves(line)
        self.stream = self.path.open("a")

    def write(self, line: dict[str, Any]) -> None:
        """Append one line; it is on disk when this returns."""
        self.stream.write(json.dumps(line) + "\n")
        self.stream.flush()
        self._curves(line)

    def close(self) -> None:
        """Flush both."""
        self.stream.close()
        self.writer.close()

    def _curves(self, line: dict[str, Any]) -> None:
        for name in CURVES:
            self.writer.add_scalar(f"{line['phase']}/{name}", line[name], line["step"])


def read_log(directory: Path) -> list[dict[str, Any]]:
    """Lines of a run's log; a last line that a kill cut short is left out."""
    path = directory / LOG
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("}\n")]
