"""The layout of a run directory: the only place that spells its paths.

`RunDir` says where a run's parts belong, for those who write them. `collect` looks at what lies there, finished or not;
it reads, never computes, and never fails over a part that is not there yet.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.manifest import CLAIM, MANIFEST, read_json

RECIPE, FILTERS, CAPTIONS, COMPARISON = "recipe.yaml", "filters", "captions", "comparison.json"
REPORT = Path("report") / "index.html"
EXPLAIN, EXPLANATION = "explain", "explanation.json"
FORECAST = "forecast"
LOGS = "logs"
_DATASET, _ADAPTER, _MERGED, _PREDICTIONS = _STAGE_FOLDERS = ("dataset", "adapter", "merged", "predictions")
SAME_AS = "same_as"
"""In a manifest: the model's directory, beside this one, whose work this is."""
_SEEDED = re.compile(r"(?P<arm>.+)-seed(?P<seed>-?\d+)")


@dataclass(frozen=True)
class Stage:
    """One stage's output directory."""

    directory: Path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The manifest; empty until the stage is complete."""
        path = self.directory / MANIFEST
        return dict(read_json(path)) if path.is_file() else {}

    @property
    def state(self) -> str:
        """`done`, `unfinished` or `missing`."""
        if self.manifest:
            return "done"
        return "unfinished" if (self.directory / CLAIM).exists() or self._holds_anything() else "missing"

    @property
    def inputs(self) -> dict[str, Any]:
        """What the fingerprint was made of, also while the stage is at work."""
        return dict(self.manifest.get("inputs") or self.json(CLAIM).get("inputs") or {})

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the stage; empty when it is not there."""
        path = self.directory / name
        return dict(read_json(path)) if path.is_file() else {}

    def _holds_anything(self) -> bool:
        return self.directory.is_dir() and any(self.directory.iterdir())


@dataclass(frozen=True)
class Walk:
    """One model's way: an arm's data, trained with one seed. `seed` is None when the run has a single one."""

    arm: str
    seed: int | None
    directory: Path

    @property
    def name(self) -> str:
        """As people call it: `enhanced`, or `enhanced, seed 1`."""
        return self.arm if self.seed is None else f"{self.arm}, seed {self.seed}"

    @cached_property
    def adapter(self) -> Stage:
        """Training."""
        return Stage(self.directory / _ADAPTER)

    @cached_property
    def merged(self) -> Stage:
        """The merged model."""
        return Stage(self.directory / _MERGED)

    @cached_property
    def likelihood(self) -> Stage:
        """How likely the merged model finds the right answers, where somebody asked."""
        return Stage(self.directory / "likelihood")

    def evaluation(self, benchmark: str) -> Stage:
        """The merged model's answers to a benchmark."""
        return Stage(self.directory / _PREDICTIONS / benchmark)

    @cached_property
    def evaluations(self) -> dict[str, Stage]:
        """Benchmark -> evaluation."""
        return {path.name: Stage(path) for path in sorted((self.directory / _PREDICTIONS).glob("*")) if path.is_dir()}


@dataclass(frozen=True)
class RunDir:
    """Where the parts of a run belong, whether they are there or not.

    Attributes:
        root: the run directory.
        seeds: of training; a run of a single seed has no seed in its names.
    """

    root: Path
    seeds: tuple[int, ...] = (0,)

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.root / RECIPE

    @property
    def refused(self) -> Path:
        """What jobs of a cluster were refused here, a file each."""
        return self.root / ".refused"

    def filters(self, arm: str) -> Path:
        """The copy of the Data-Juicer recipe that refines an arm."""
        return self.root / FILTERS / f"{arm}.yaml"

    def captions(self, name: str = "") -> Path:
        """What captioning wrote, of one caption set; a set without a name is the only one."""
        return self.root / CAPTIONS / name

    @property
    def comparison(self) -> Path:
        """The result, over all seeds."""
        return self.root / COMPARISON

    @property
    def report(self) -> Path:
        """The page that a person opens."""
        return self.root / REPORT

    def explaining(self, arm: str) -> Path:
        """The directory of the runs that split an arm's gain over its causes."""
        return self.root / EXPLAIN / arm

    def explanation(self, arm: str) -> Path:
        """The result of that."""
        return self.explaining(arm) / EXPLANATION

    def two_by_two(self, arm: str) -> Path:
        """A split of an arm's gain over captions and filters by other arms of the run, where there are such."""
        return self.root / EXPLAIN / f"{arm}.json"

    @property
    def forecasting(self) -> Path:
        """The directory of the run that tries this one in small."""
        return self.root / FORECAST

    @property
    def forecast(self) -> Path:
        """The result of that."""
        return self.forecasting / f"{FORECAST}.json"

    def log(self, job: str) -> Path:
        """What a job of a cluster printed, all its attempts."""
        return self.root / LOGS / f"{job}.log"

    def dataset(self, arm: str) -> Path:
        """An arm's refined data: the same for all seeds."""
        return self.root / arm / _DATASET

    def walk(self, arm: str, seed: int) -> Walk:
        """One model's way."""
        return _walk(self.root, arm, None if len(self.seeds) == 1 else seed)

    def comparing(self, seed: int, benchmark: str = "") -> Path:
        """The directory that the comparison of one seed's models is written to.

        Args:
            benchmark: a further one; empty: the one that gives the verdict.
        """
        here = self.root if len(self.seeds) == 1 else self.root / f"comparison-seed{seed}"
        return here / f"comparison-{benchmark}" if benchmark else here


@dataclass(frozen=True)
class InnerRun(RunDir):
    """A run within another one, whose captions it reads."""

    outer: RunDir = RunDir(Path())

    def captions(self, name: str = "") -> Path:
        """The other run's."""
        return self.outer.captions(name)


def _walk(root: Path, arm: str, seed: int | None) -> Walk:
    return Walk(arm, seed, root / (arm if seed is None else f"{arm}-seed{seed}"))


def arm_of(evaluation: Path) -> str:
    """`runs/x/enhanced/predictions/textvqa` belongs to the arm `enhanced`; any other directory has its own name."""
    place = evaluation.resolve()
    return place.parent.parent.name if place.parent.name == _PREDICTIONS else place.name


@dataclass(frozen=True)
class Run:
    """A run directory as it was found.

    Attributes:
        recipe: the resolved recipe; empty when there is none.
        captions: caption set -> what captioning wrote; a set without a name is the only one.
        datasets: arm -> refined dataset, the baseline first; not of an arm that needs none.
        walks: every model that was or will be trained, in the order of `datasets` and seeds.
        comparison: `comparison.json`; empty until all arms are evaluated.
        seeds: (seed, comparison) of each training seed; one with seed None in a run of a single seed.
    """

    directory: Path
    recipe: dict[str, Any]
    recipe_text: str
    captions: dict[str, Stage]
    datasets: dict[str, Stage]
    walks: list[Walk]
    comparison: dict[str, Any]
    seeds: list[tuple[int | None, dict[str, Any]]] = field(default_factory=list)

    @property
    def arms(self) -> list[str]:
        """Every arm, the baseline first."""
        return list(dict.fromkeys(walk.arm for walk in self.walks))

    def captions_of(self, arm: str) -> Stage | None:
        """The captions that an arm's data are made from; None where it has no data, or nothing says which."""
        own = (self.recipe.get("arms") or {}).get(arm) or {}
        name = own.get("captions") or next(iter(self.captions), "")
        return self.captions.get(name) if arm in self.datasets else None

    def worker(self, walk: Walk) -> Walk:
        """The model's way on which the work was done: of an arm whose data equal another's, the other's."""
        other = walk.adapter.manifest.get(SAME_AS)
        return Walk(walk.arm, walk.seed, self.directory / other) if other else walk

    @property
    def baseline(self) -> str:
        """The arm that the others are compared with."""
        return _baseline(self.recipe, self.comparison)

    @property
    def explanations(self) -> dict[str, dict[str, Any]]:
        """Arm -> what `captune explain` found, else what the run's own arms say."""
        place = self.directory / EXPLAIN
        files = {path.stem: path for path in sorted(place.glob("*.json"))}
        files |= {path.parent.name: path for path in sorted(place.glob(f"*/{EXPLANATION}"))}
        return {arm: dict(read_json(path)) for arm, path in files.items()}

    def stages(self) -> Iterator[tuple[str, Stage]]:
        """Every stage directory that exists, with its path inside the run."""
        places = [*self.captions.values(), *self.datasets.values()]
        for walk in self.walks:
            places += [walk.adapter, walk.merged, *walk.evaluations.values()]
        for stage in places:
            if stage.state != "missing":
                yield str(stage.directory.relative_to(self.directory)), stage


def holds_a_run(directory: Path) -> bool:
    """Whether something of a run lies there, sound or not."""
    places = RunDir(directory)
    return places.recipe.is_file() or places.comparison.is_file() or bool(_captions(places, {}))


def collect(run_dir: Path | str) -> Run:
    """Look at a run directory.

    Raises:
        UserError: no such directory, or one that holds nothing of a run.
    """
    directory = Path(run_dir).resolve()
    if not directory.is_dir():
        raise UserError(f"{run_dir}: no such run directory")
    places = RunDir(directory)
    recipe_text, recipe = _recipe(places.recipe)
    comparison = Stage(directory).json(COMPARISON)
    captions = _captions(places, recipe)
    walks = _walks(directory, recipe, comparison)
    if not (recipe or comparison or walks or captions):
        raise UserError(f"{run_dir}: holds no run (no {RECIPE}, no {CAPTIONS}/, no {COMPARISON})")
    arms = dict.fromkeys(walk.arm for walk in walks)
    datasets = {arm: Stage(places.dataset(arm)) for arm in arms if _has_data(recipe, arm)}
    seeds: list[tuple[int | None, dict[str, Any]]] = [(None, comparison)] if comparison.get("arms") else []
    if comparison.get("seeds"):
        seeds = [(entry["seed"], entry) for entry in comparison["seeds"]]
    return Run(directory, recipe, recipe_text, captions, datasets, walks, comparison, seeds)


def _recipe(path: Path) -> tuple[str, dict[str, Any]]:
    import yaml

    if not path.is_file():
        return "", {}
    text = path.read_text(encoding="utf-8")
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({error})") from error
    return text, recipe if isinstance(recipe, dict) else {}


def _captions(places: RunDir, recipe: dict[str, Any]) -> dict[str, Stage]:
    """The caption sets that the recipe promises, or else those that lie there."""
    names = list(recipe.get("captions") or {})
    if recipe and not names and any(_has_data(recipe, arm) for arm in recipe.get("arms") or [""]):
        names = [""]
    if not recipe:
        begun = {claim.parent for claim in places.captions().glob(f"**/{CLAIM}")}
        names = sorted(str(place.relative_to(places.captions())).removeprefix(".") for place in begun)
    return {name: Stage(places.captions(name)) for name in names}


def _has_data(recipe: dict[str, Any], arm: str) -> bool:
    return ((recipe.get("arms") or {}).get(arm) or {}).get("align") != "none"


def _walks(directory: Path, recipe: dict[str, Any], comparison: dict[str, Any]) -> list[Walk]:
    """Those the recipe promises and those that lie there, the baseline's first."""
    found: dict[str, set[int | None]] = {arm: set() for arm in recipe.get("arms") or {}}
    for folder in sorted(path for path in directory.iterdir() if path.is_dir()):
        if not any((folder / name).is_dir() for name in _STAGE_FOLDERS):
            continue
        seeded = _SEEDED.fullmatch(folder.name)
        if seeded and not (folder / _DATASET).exists():  # an arm's data are refined once, whatever the number of seeds
            found.setdefault(seeded["arm"], set()).add(int(seeded["seed"]))
        else:
            own = {None} if any((folder / name).is_dir() for name in _STAGE_FOLDERS[1:]) else set()
            found.setdefault(folder.name, set()).update(own)
    promised = recipe.get("seeds") or [0]
    for seeds in found.values():
        seeds |= set(promised) if len(promised) > 1 else set() if seeds else {None}
    baseline = _baseline(recipe, comparison)
    return [
        _walk(directory, arm, seed)
        for arm in sorted(found, key=lambda arm: arm != baseline)
        for seed in sorted(found[arm], key=lambda seed: (seed is not None, seed or 0))
    ]


def _baseline(recipe: dict[str, Any], comparison: dict[str, Any]) -> str:
    return str(comparison.get("baseline") or (recipe.get("compare") or {}).get("baseline") or "original")
