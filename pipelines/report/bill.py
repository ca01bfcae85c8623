"""What a run cost, by stage and group of nodes, and what was gained for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipelines import cost
from pipelines.rundir import Run, Walk


@dataclass(frozen=True)
class Line:
    """Hours of one group while one stage was at work; `worked` is a share, None where nothing there can work."""

    place: str
    group: str
    node_hours: float
    gpu_hours: float
    worked: float | None


@dataclass(frozen=True)
class Gain:
    """Points of an arm over the baseline (as shares), the hours of its own way to them, and both in one number.

    Attributes:
        unit: `GPU-hour`, or `node-hour` where the arm used no card.
        rate: points (as a share) gained in such an hour; None where a stage on the way says no hours.
    """

    name: str
    arm: str
    points: float
    hours: float | None
    unit: str
    rate: float | None


def lines(run: Run) -> list[Line]:
    """Every stage that says what it used, and the sum of each group where there are several stages."""
    said = [(place, cost.of(stage.manifest)) for place, stage in run.stages() if cost.of(stage.manifest)]
    if len(said) > 1:
        said.append(("all stages", cost.added(hours for _, hours in said)))
    return [
        Line(place, group, used["node_hours"], used["gpu_hours"], cost.worked(used))
        for place, hours in said
        for group, used in hours.items()
    ]


def gains(run: Run) -> list[Gain]:
    """Of every comparison with the baseline, seed by seed."""
    walks = {(walk.arm, walk.seed): walk for walk in run.walks}
    return [
        _gain(arm if seed is None else f"{arm}, seed {seed}", walks[arm, seed], run, difference["difference"])
        for seed, found in run.seeds
        for arm, difference in found["differences"].items()
        if (arm, seed) in walks
    ]


def _gain(name: str, walk: Walk, run: Run, points: float) -> Gain:
    parts = list(_way(walk, run))
    total = cost.added(parts)
    gpu_hours = sum(used["gpu_hours"] for used in total.values())
    hours = gpu_hours or sum(used["node_hours"] for used in total.values())
    unit = "GPU-hour" if gpu_hours else "node-hour"
    if not (all(parts) and hours):
        return Gain(name, walk.arm, points, None, unit, None)
    return Gain(name, walk.arm, points, hours, unit, points / hours)


def _way(walk: Walk, run: Run) -> Iterator[cost.Hours]:
    """What each stage from the dataset to this model's score used; the captions only where the arm trains on them."""
    dataset, captions = run.datasets.get(walk.arm), run.captions_of(walk.arm)
    if dataset and captions and dataset.manifest.get("text") == "recaption":
        yield cost.of(captions.manifest)
    if dataset:
        yield cost.of(dataset.manifest)
    worked = run.worker(walk)
    for stage in (worked.adapter, worked.merged, *worked.evaluations.values()):
        yield cost.of(stage.manifest)
