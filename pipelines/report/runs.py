"""A table over runs: what each tried, how far it is, what it found and what it cost."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines import cost
from pipelines.errors import UserError
from pipelines.evaluate.registry import title
from pipelines.progress import say
from pipelines.report import templates
from pipelines.rundir import Run, RunDir, collect, holds_a_run


@dataclass(frozen=True)
class Row:
    """One run. Scores and differences are shares in [0, 1].

    Attributes:
        arm: with the largest difference to the baseline; empty while nothing is compared.
        interval: of that difference; over pictures, and over seeds where there are several.
        shown: the difference excludes zero.
        finished: when its last finished stage was, in UTC; empty while none is.
    """

    run: str
    dataset: str
    caption_model: str
    arms: list[str]
    seeds: int
    stages_done: int
    stages: int
    benchmark: str
    baseline_score: float | None
    arm: str
    arm_score: float | None
    difference: float | None
    interval: list[float] | None
    shown: bool
    gpu_hours: float
    node_hours: float
    finished: str


def rows(places: Sequence[Path]) -> list[Row]:
    """Of every run directory among `places` and directly below them, the latest first; one that cannot be read is said
    and left out.

    Raises:
        UserError: there is no run.
    """
    found = list(_readable(places))
    if not found:
        raise UserError(f"no run in {', '.join(map(str, places))}; captune run RECIPE makes one")
    return sorted(found, key=lambda row: row.finished, reverse=True)


def table(found: Sequence[Row]) -> str:
    """For a terminal."""
    head = ("run", "data", "arms", "stages", "benchmark", "result", "GPU-hours", "node-hours", "finished")
    lines = [head, *(_cells(row) for row in found)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def page(found: Sequence[Row], folder: Path) -> str:
    """The same as a page in `folder`, whose rows lead to the runs' reports; it loads nothing."""
    reports = {row.run: _report(row, folder) for row in found}
    return templates.render("runs.html.j2", {"rows": found, "reports": reports, "title": title})


def as_json(found: Sequence[Row]) -> list[dict[str, Any]]:
    """For programs."""
    return [asdict(row) for row in found]


def _readable(places: Sequence[Path]) -> Iterator[Row]:
    for folder in dict.fromkeys(folder.resolve() for place in places for folder in _folders(place)):
        if not holds_a_run(folder):
            continue
        try:
            yield _row(collect(folder))
        except (UserError, TypeError, KeyError, AttributeError) as error:  # damaged, or of another version
            say(f"runs: {folder} cannot be read: {error}")


def _folders(place: Path) -> list[Path]:
    if not place.is_dir():
        raise UserError(f"{place}: no such directory")
    return [place, *sorted(each for each in place.iterdir() if each.is_dir())]


def _row(run: Run) -> Row:
    manifests = [stage.manifest for _, stage in run.stages() if stage.manifest]
    used = cost.added(cost.of(manifest) for manifest in manifests)
    hours = {kind: round(sum(each[kind] for each in used.values()), 3) for kind in ("gpu_hours", "node_hours")}
    wanted = len(run.captions) + len(run.datasets) + 3 * len(run.walks)
    found = run.comparison
    summary = found.get("summary", {}).get("differences", {})
    every = {
        arm: (entry["mean"], entry["interval"], entry["excludes_zero"])
        if (entry := summary.get(arm))
        else (single["difference"], single["interval"], single["excludes_zero"])
        for arm, single in found.get("differences", {}).items()
    }
    arm = max(every, key=lambda name: every[name][0], default="")
    difference, interval, shown = every.get(arm, (None, None, False))
    scores = {name: entry["accuracy"] for name, entry in found.get("arms", {}).items()}
    return Row(
        run=str(run.directory),
        dataset=str(run.recipe.get("dataset") or ""),
        caption_model=str((run.recipe.get("caption") or {}).get("model") or ""),
        arms=run.arms,
        seeds=len(run.recipe.get("seeds") or [0]),
        stages_done=len(manifests),
        stages=wanted,
        benchmark=str(found.get("benchmark") or ""),
        baseline_score=scores.get(run.baseline),
        arm=arm,
        arm_score=scores.get(arm),
        difference=difference,
        interval=interval,
        shown=bool(shown),
        finished=max((manifest["finished"] for manifest in manifests), default=""),
        **hours,
    )


def _cells(row: Row) -> tuple[str, ...]:
    result = "not compared yet"
    if row.difference is not None and row.interval is not None:
        low, high = (100 * end for end in row.interval)
        result = f"{row.arm} {100 * row.difference:+.1f} ({low:+.1f} to {high:+.1f})" + ("" if row.shown else ", open")
    arms = ", ".join(row.arms) + (f" x {row.seeds} seeds" if row.seeds > 1 else "")
    stages = "all" if row.stages_done >= row.stages else f"{row.stages_done} of {row.stages}"
    benchmark = title(row.benchmark) if row.benchmark else ""
    hours = [f"{value:.2f}" if value else "" for value in (row.gpu_hours, row.node_hours)]
    data = Path(row.dataset).name
    return Path(row.run).name, data, arms, stages, benchmark, result, *hours, row.finished.replace("T", " ")[:16]


def _report(row: Row, folder: Path) -> str:
    """Where the run's own page is, from `folder`; empty while there is none."""
    path = RunDir(Path(row.run)).report
    return Path(os.path.relpath(path, folder.resolve())).as_posix() if path.is_file() else ""
