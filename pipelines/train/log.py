"""The training log: `log.jsonl`, one line per logged step, and the same curves for TensorBoard and a tracker.

After a restart the steps since the last checkpoint are done again. Their lines are dropped first and TensorBoard's
files are written anew from the lines that stay, so that no step ever appears twice. A tracker keeps the steps that it
has been told: done again, they are the same.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.files import write_text
from pipelines.train.stability import measure
from pipelines.train.trackers import Tracker

LOG = "log.jsonl"
TENSORBOARD = "tensorboard"
CURVES = ("loss", "held_out_loss", "grad_norm", "clipped", "learning_rate", "samples_per_second", "peak_memory_gib")


class TrainLog:
    """Writes the log of one run; only the first worker has one.

    Args:
        done: phase -> steps that the checkpoint holds; later lines are dropped.
        tracker: that is told the same.
    """

    def __init__(self, directory: Path, done: dict[str, int], tracker: Tracker | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = directory / LOG
        drop_after(directory, done)
        kept = read_log(directory)
        shutil.rmtree(directory / TENSORBOARD, ignore_errors=True)
        self.writer = SummaryWriter(str(directory / TENSORBOARD))
        for line in kept:
            self._curves(line)
        self.lines, self.tracker = kept, tracker
        if tracker is not None:
            tracker.send(kept)
        self.stream = self.path.open("a")

    def write(self, line: dict[str, Any]) -> None:
        """Append one line; it is on disk when this returns."""
        self.stream.write(json.dumps(line) + "\n")
        self.stream.flush()
        self.lines.append(line)
        self._curves(line)
        if self.tracker is not None:
            self.tracker.send(self.lines)

    def stability(self, phase: str) -> dict[str, Any]:
        """`pipelines.train.stability.measure` of a phase that has logged something; TensorBoard is told, too."""
        found = measure([line for line in self.lines if line["phase"] == phase])
        table = "".join(f"| {key} | {value} |\n" for key, value in asdict(found).items())
        self.writer.add_text(f"{phase}/stability", f"{found.verdict}\n\n| | |\n|---|---|\n{table}")
        if self.tracker is not None:
            self.tracker.note(f"{phase}.stability", found.verdict)
        return asdict(found)

    def __enter__(self) -> TrainLog:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(failed=kind is not None)

    def close(self, failed: bool = False) -> None:
        """Flush everything; `failed` is how the tracker's run ends."""
        self.stream.close()
        self.writer.close()
        if self.tracker is not None:
            self.tracker.close(failed)

    def _curves(self, line: dict[str, Any]) -> None:
        for name in CURVES:
            if name in line:  # the held-out loss is not measured in every step
                self.writer.add_scalar(f"{line['phase']}/{name}", line[name], line["step"])


def drop_after(directory: Path, done: dict[str, int]) -> int:
    """Leave only lines of the steps in `done`, phase -> steps; returns how many went."""
    lines = read_log(directory)
    kept = [line for line in lines if line["step"] <= done.get(line["phase"], 0)]
    write_text(directory / LOG, "".join(json.dumps(line) + "\n" for line in kept))
    return len(lines) - len(kept)


def read_log(directory: Path) -> list[dict[str, Any]]:
    """Lines of a run's log; a last line that a kill cut short is left out."""
    path = directory / LOG
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("}\n")]
