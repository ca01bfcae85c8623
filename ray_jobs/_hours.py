"""Hours that the steps of a plan should take, at the rates of finished stages of the same kind. What nobody has
measured stays unknown.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import cost
from pipelines.rundir import SAME_AS, collect
from ray_jobs.recipe import Recipe


@dataclass(frozen=True)
class Rate:
    """What finished stages of a kind took for so much work: rows, in training samples, in merging models."""

    work: int
    hours: cost.Hours
    where: str

    def hours_of(self, work: int) -> cost.Hours:
        """Hours for other work at the same rate."""
        return cost.rounded(cost.scaled(self.hours, work / self.work))


def rates(measured: Path, recipe: Recipe) -> dict[str, Rate]:
    """Kind of stage, and kind and arm -> rate, from a run directory: where models and cards are those of `recipe`.

    Raises:
        UserError: no such run.
    """
    run = collect(measured)
    found: dict[str, Rate] = {}
    for place, stage in run.stages():
        manifest = stage.manifest
        kind, work, hours = manifest.get("stage", ""), _work(manifest), cost.of(manifest)
        if not (work and hours) or SAME_AS in manifest or _basis(run.recipe, kind) != _basis_of(recipe, kind):
            continue
        part = Path(place).parts[1 if kind == "caption" and Path(place).parent.parts else 0]
        for key in (kind, f"{kind} {part}"):  # filters differ from arm to arm, captioners from set to set
            before = found.get(key, Rate(0, {}, f"{run.directory.name}/{place}"))
            found[key] = Rate(before.work + work, cost.added([before.hours, hours]), before.where)
    return found


def total(parts: Iterable[cost.Hours]) -> str:
    """`caption 2.5 GPU-hours, cpu 1.2 node-hours`: of each group its cards, or its nodes where it has none."""
    return ", ".join(f"{group} {_shown(used)}" for group, used in cost.added(parts).items())


def _shown(used: dict[str, float]) -> str:
    if used.get("gpu_hours"):
        return f"{used['gpu_hours']:.3g} GPU-hours"
    if "node_hours" in used:
        return f"{used['node_hours']:.3g} node-hours"
    return f"{used['cpu_hours']:.3g} CPU-hours"


def _work(manifest: dict[str, Any]) -> int:
    if manifest.get("stage") == "merge":
        return 1
    if manifest.get("stage") == "train":
        settings = manifest["inputs"]["config"]
        return sum(settings[name]["steps"] * settings[name]["batch"] for name in manifest["phases"])
    rows = manifest.get("rows_in")
    return rows if isinstance(rows, int) else 0


_KEYS = {
    "caption": ("caption.model", "caption.dtype", "caption.max_new_tokens", "caption.gpus_per_actor"),
    "refine": (),
    "train": ("train.model", "train.method", "train.strategy", "train.precision", "train.use_gpu"),
    "merge": ("train.model",),
    "evaluate": ("train.model", "serve.dtype", "serve.gpus_per_replica", "evaluate.benchmark"),
}
"""Kind of stage -> the settings without which its rate is another one."""


def _basis(recipe: dict[str, Any], kind: str) -> list[Any]:
    """Of a run's resolved recipe; models by their directories' names, since runs lie elsewhere."""
    found = []
    for key in _KEYS.get(kind, ()):
        section, name = key.split(".")
        value = (recipe.get(section) or {}).get(name)
        found.append(Path(value).name if name == "model" and value else value)
    return found


def _basis_of(recipe: Recipe, kind: str) -> list[Any]:
    sections = {key.split(".")[0] for key in _KEYS.get(kind, ())}
    return _basis({section: vars(getattr(recipe, section)) for section in sections}, kind)
