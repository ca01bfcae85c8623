"""The same training, whatever the strategy, the workers, the micro-batches and the rows: one table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pipelines.train import grid

TOLERANCE = 1e-5
_COLUMNS = ("loss", "grad_norm", "gradients", "weights")

# Images of each row in the order in which the steps take them; within a step the longest come first, so those with an
# image. Mixed: the second of two workers sees no image at its whole step, and some micro-batches have one row of each.
_IMAGES = {
    "with": [1] * 16,
    "without": [0] * 16,
    "mixed": [0, 0, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0],
}
_SILENT = (10, 15)  # of the mixed rows the shortest: a micro-batch without any target

Table = dict[tuple[Any, ...], dict[str, Any]]


def _entry(tiny: Any, folder: Path, number: int, images: int, answer: str) -> dict[str, Any]:
    """A conversation about so many pictures; the rows differ in length."""
    asked = "<image>\n" * images + "what is it ? " * (1 + number % 5)
    turns = [{"from": "human", "value": asked.strip()}, {"from": "gpt", "value": answer}]
    if not images:
        return {"conversations": turns}
    colour = list(tiny.COLOURS)[number % len(tiny.COLOURS)]
    (folder / f"{number}.jpg").write_bytes(tiny.jpeg(colour, shade=number))
    return {"conversations": turns, "image": f"{number}.jpg"}


@pytest.fixture(scope="module")
def table(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Table:
    """Every training of the table, by two groups of processes side by side."""
    out = tmp_path_factory.mktemp("table")
    model_dir = tiny.write_model(out / "model", layers=1)
    for rows, images in _IMAGES.items():
        silent = _SILENT if rows == "mixed" else ()
        answers = [grid.SILENT if n in silent else "red " * (1 + n % 3) + "square ." for n in range(16)]
        entries = [_entry(tiny, out, n, images[n], answers[n]) for n in range(16)]
        (out / f"{rows}.json").write_text(json.dumps(entries))
    group = [_process(model_dir, out, rank, workers) for workers in grid.WORKERS for rank in range(workers)]
    for process in group:
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
    return {k: v for workers in grid.WORKERS for k, v in torch.load(out / f"{workers}.pt").items()}


def _process(model_dir: Path, out: Path, rank: int, workers: int) -> subprocess.Popen[str]:
    place = {"OMP_NUM_THREADS": 1, "LOCAL_RANK": rank, "RANK": rank, "WORLD_SIZE": workers}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.pipelines.train.grid", *map(str, (model_dir, out, out, rank, workers))],
        cwd=Path(__file__).parents[3],
        env=os.environ | {key: str(value) for key, value in place.items()},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _apart(found: dict[str, Any], reference: dict[str, Any], what: str) -> float:
    """Largest relative difference, of numbers or of whole tensors."""
    if what in ("loss", "grad_norm"):
        pairs = [(torch.tensor(a), torch.tensor(b)) for a, b in zip(found[what], reference[what], strict=True)]
    else:
        assert set(found[what]) == set(reference[what])
        pairs = [(found[what][name], tensor) for name, tensor in reference[what].items()]
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float((a - b).norm() / b.norm()) if (a != b).any() else 0.0 for a, b in pairs)


@pytest.mark.heavy
@pytest.mark.timeout(1200)
def test_every_training_equals_one_plain_process(table: Table) -> None:
    """Losses, gradient norms, gradients and weights, where micro-batches, or one worker's whole step, show no image and
    where one has no target: what learns takes part in each, and ZeRO's workers wait for each other nowhere in vain.
    """
    apart = {}
    for cell in (cell for workers in grid.WORKERS for cell in grid.cells(workers)):
        reference = table[grid.reference(cell.phase, cell.rows)]
        apart[cell] = max(_apart(table[cell], reference, column) for column in _COLUMNS)
    print("\n" + _draw(apart))
    assert {cell: number for cell, number in apart.items() if number > TOLERANCE} == {}
    norms = [norm for cell in grid.references() for norm in table[cell]["grad_norm"]]
    assert min(norms) == 0 < grid.CLIP < max(norms)  # nothing to learn at all, and clipped


def _draw(apart: dict[grid.Cell, float]) -> str:
    """A line for each way to spread a step, a column for each phase and kind of rows: the largest difference."""
    columns = [(cell.phase, cell.rows) for cell in grid.references()]
    lines = ["workers x micro-batch x accumulation".ljust(40) + "".join(f"{p}, {r}".rjust(19) for p, r in columns)]
    for strategy, workers, micro_batch in dict.fromkeys(cell[:3] for cell in apart if cell.strategy != "plain"):
        cells = [grid.Cell(strategy, workers, micro_batch, *column) for column in columns]
        name = f"{strategy} {workers} x {micro_batch} x {cells[0].accumulation}"
        lines.append(
            name.ljust(40) + "".join((f"{apart[cell]:.1e}" if cell in apart else "").rjust(19) for cell in cells)
        )
    return "\n".join(lines)
