"""The stages of a recipe one by one: which there are, in order, what each waits for, and doing it.

`captune run` does all of them in one process, and `captune run --stage train --arm enhanced --seed 1` one of them with
the same files and settings; so jobs of a stage each and whole runs continue each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import Problem, UserError
from pipelines.manifest import MANIFEST
from pipelines.rundir import RunDir
from ray_jobs.recipe import Recipe

STAGES = ("sample", "assemble", "caption", "refine", "train", "merge", "evaluate", "compare")
"""In the order of a run; `compare` also draws the report."""
OF_AN_ARM = ("refine", "train", "merge", "evaluate")
OF_A_SEED = ("train", "merge", "evaluate")


@dataclass(frozen=True)
class Step:
    """A stage, of an arm and a seed where it has them."""

    stage: str
    arm: str = ""
    seed: int | None = None

    @property
    def words(self) -> list[str]:
        """The options of `captune run` that do this step alone."""
        arm = ["--arm", self.arm] if self.arm else []
        return ["--stage", self.stage, *arm, *(["--seed", str(self.seed)] if self.seed is not None else [])]

    def __str__(self) -> str:
        seed = "" if self.seed is None else f"seed {self.seed}"
        return f"{self.stage} {', '.join(filter(None, (self.arm, seed)))}".strip()


def steps(recipe: Recipe, stage: str = "", arm: str = "", seed: int | None = None) -> list[Step]:
    """The steps of a run in their order; those of one stage, arm or seed where they are named.

    Raises:
        UserError: the recipe has no such stage, arm or seed.
    """
    every = list(_every(recipe))
    if stage and stage not in STAGES:
        raise UserError(f"--stage {stage}: must be one of {', '.join(STAGES)}")
    if arm and arm not in recipe.arms:
        raise UserError(f"--arm {arm}: the recipe's arms are {', '.join(recipe.arms) or 'none'}")
    if arm and stage not in OF_AN_ARM:
        raise UserError(f"--arm {arm}: {stage or 'a whole run'} is of all arms")
    if seed is not None and seed not in recipe.seeds:
        raise UserError(f"--seed {seed}: the recipe's seeds are {', '.join(map(str, recipe.seeds))}")
    if seed is not None and stage not in OF_A_SEED:
        raise UserError(f"--seed {seed}: {stage or 'a whole run'} is of all seeds")
    several = len(recipe.seeds) > 1  # of a single one nobody says which
    wanted = seed if several else None
    chosen = [
        step for step in every if stage in ("", step.stage) and arm in ("", step.arm) and wanted in (None, step.seed)
    ]
    if not chosen:
        raise UserError(f"--stage {stage}: {_why_not(stage)}")
    return chosen


def _every(recipe: Recipe) -> Iterator[Step]:
    if recipe.sample.out:
        yield Step("sample")
    if recipe.assemble.wanted:
        yield Step("assemble")
    yield Step("caption")
    for arm in recipe.arms:
        yield Step("refine", arm)
    for seed in recipe.seeds:
        for arm in recipe.arms:
            yield from (Step(stage, arm, seed if len(recipe.seeds) > 1 else None) for stage in OF_A_SEED)
    if recipe.arms:
        yield Step("compare")


def _why_not(stage: str) -> str:
    return {
        "sample": "the recipe draws no sample world (sample.out is not set)",
        "assemble": "the recipe assembles no base (its section assemble is empty)",
    }.get(stage, "the recipe has no arms")


def output(recipe: Recipe, place: RunDir, step: Step) -> Path:
    """The directory that a step writes."""
    if step.stage in OF_A_SEED:
        walk = place.walk(step.arm, recipe.seeds[0] if step.seed is None else step.seed)
        evaluation = walk.evaluation(recipe.evaluate.benchmark)
        return {"train": walk.adapter, "merge": walk.merged, "evaluate": evaluation}[step.stage].directory
    return {
        "sample": lambda: Path(recipe.sample.out or ""),
        "assemble": lambda: Path(recipe.train.model),
        "caption": lambda: place.captions,
        "refine": lambda: place.dataset(step.arm),
        "compare": lambda: place.root,
    }[step.stage]()


def outputs(recipe: Recipe, place: RunDir, step: Step) -> list[Path]:
    """`output`, and of an evaluation the directories of the other benchmarks, too."""
    if step.stage != "evaluate":
        return [output(recipe, place, step)]
    walk = place.walk(step.arm, recipe.seeds[0] if step.seed is None else step.seed)
    return [walk.evaluation(benchmark).directory for benchmark in recipe.evaluate.each()]


def unfinished(recipe: Recipe, place: RunDir, wanted: list[Step]) -> Iterator[Problem]:
    """Steps that have to be done before those that are `wanted`, and neither are nor will be."""
    for step in dict.fromkeys(earlier for each in wanted for earlier in before(recipe, each)):
        missing = [each for each in outputs(recipe, place, step) if not (each / MANIFEST).is_file()]
        if step not in wanted and missing:
            words, where = " ".join(step.words), missing[0]
            yield Problem("--stage", f"{step} comes first and has not finished in {where}: captune run RECIPE {words}")


def before(recipe: Recipe, step: Step) -> list[Step]:
    """What a step reads of others."""
    arm = step.arm
    made = [Step("sample")] if recipe.sample.out else []
    base = [Step("assemble")] if recipe.assemble.wanted else []
    return {
        "sample": [],
        "assemble": made,
        "caption": made,
        "refine": [Step("caption")],
        "train": [*made, *base, Step("refine", arm)],
        "merge": [*base, Step("train", arm, step.seed)],
        "evaluate": [*made, Step("merge", arm, step.seed)],
        "compare": [each for each in _every(recipe) if each.stage == "evaluate"],
    }[step.stage]


def perform(recipe: Recipe, place: RunDir, step: Step, *, restart: bool) -> None:
    """Do a step, but for `compare`; complete already, it says so and does nothing. Those of different arms or seeds may
    be done at once, in threads.

    Raises:
        UserError: its directory holds another run's work, or another process writes there.
        WorkFailed: it broke off; the same again continues.
    """
    arm, directory = step.arm, output(recipe, place, step)
    match step.stage:
        case "sample":
            from pipelines.sample.world import write_world

            write_world(directory, recipe.sample, restart=restart)
        case "assemble":
            from pipelines.mgm import assemble

            assemble.run(recipe.assemble, recipe.train.model, restart=restart)
        case "caption":
            from pipelines.caption import stage as caption

            caption.run(recipe.dataset, directory, recipe.caption, restart=restart)
        case "refine":
            from pipelines.refine import stage as refine

            refine.run(place.captions, directory, recipe.arms[arm], arm=arm, restart=restart)
        case _:
            _of_a_model(recipe, place, step, restart)


def _of_a_model(recipe: Recipe, place: RunDir, step: Step, restart: bool) -> None:
    """Training, merging or asking the model of one arm and seed."""
    seed = recipe.seeds[0] if step.seed is None else step.seed
    walk, base = place.walk(step.arm, seed), Path(recipe.train.model)
    adapter, merged = walk.adapter.directory, walk.merged.directory
    match step.stage:
        case "train":
            from pipelines.train import stage as loop

            train = recipe.training(step.arm, seed)
            data = place.dataset(step.arm)
            loop.run(data, base, adapter, train, arm=walk.directory.name, restart=restart)
        case "merge":
            from pipelines.adapters import merge

            merge.run(base, adapter, merged, recipe.merge, restart=restart)
        case "evaluate":
            from pipelines.evaluate import stage as evaluate
            from ray_jobs.evaluate import served

            with evaluate.kept(served(merged, recipe.serve, walk.directory.name)) as service:
                for benchmark, config in recipe.evaluate.each().items():
                    place_of = walk.evaluation(benchmark).directory
                    evaluate.run(place_of, config, evaluate.Served(merged, service), restart=restart)
