"""The stages of a recipe one by one: which there are, in order, what each waits for, and doing it.

`captune run` does all of them in one process, and `captune run --stage train --arm enhanced --seed 1` one of them with
the same files and settings; so jobs of a stage each and whole runs continue each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pipelines import same
from pipelines.errors import Problem, UserError
from pipelines.manifest import MANIFEST, identity
from pipelines.modelfiles import model_identity
from pipelines.progress import say
from pipelines.rundir import SAME_AS, RunDir, Walk
from ray_jobs.recipe import Recipe

STAGES = ("sample", "assemble", "caption", "refine", "train", "merge", "evaluate", "compare")
"""In the order of a run; `compare` also draws the report."""
OF_AN_ARM = ("refine", "train", "merge", "evaluate")
OF_A_SEED = ("train", "merge", "evaluate")


@dataclass(frozen=True)
class Step:
    """A stage, of an arm, a seed or a caption set where it has them."""

    stage: str
    arm: str = ""
    seed: int | None = None
    captions: str = ""

    @property
    def words(self) -> list[str]:
        """The options of `captune run` that do this step alone."""
        arm = ["--arm", self.arm] if self.arm else []
        arm += ["--set", self.captions] if self.captions else []
        return ["--stage", self.stage, *arm, *(["--seed", str(self.seed)] if self.seed is not None else [])]

    def __str__(self) -> str:
        seed = "" if self.seed is None else f"seed {self.seed}"
        return f"{self.stage} {', '.join(filter(None, (self.captions, self.arm, seed)))}".strip()


def steps(recipe: Recipe, stage: str = "", arm: str = "", seed: int | None = None, captions: str = "") -> list[Step]:
    """The steps of a run in their order; those of one stage, arm, seed or caption set where they are named.

    Raises:
        UserError: the recipe has no such stage, arm, seed or caption set.
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
    if captions and captions not in recipe.captions:
        raise UserError(f"--set {captions}: the recipe's caption sets are {', '.join(recipe.captions) or 'none'}")
    if captions and stage != "caption":
        raise UserError(f"--set {captions}: {stage or 'a whole run'} is of all caption sets")
    several = len(recipe.seeds) > 1  # of a single one nobody says which
    wanted = seed if several else None
    chosen = [
        step
        for step in every
        if stage in ("", step.stage)
        and arm in ("", step.arm)
        and wanted in (None, step.seed)
        and captions in ("", step.captions)
    ]
    if not chosen:
        raise UserError(f"--stage {stage}: {_why_not(recipe, stage)}")
    return chosen


def _every(recipe: Recipe) -> Iterator[Step]:
    if recipe.sample.out:
        yield Step("sample")
    if recipe.assemble.wanted:
        yield Step("assemble")
    for name in recipe.sets:
        yield Step("caption", captions=name)
    for arm in recipe.arms:
        if recipe.has_data(arm):
            yield Step("refine", arm)
    for seed in recipe.seeds:
        for arm in recipe.arms:
            yield from (Step(stage, arm, seed if len(recipe.seeds) > 1 else None) for stage in OF_A_SEED)
    if recipe.arms:
        yield Step("compare")


def _why_not(recipe: Recipe, stage: str) -> str:
    if stage in ("caption", "refine") and recipe.arms:
        return "it has nothing to do for an arm with align: none"
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
        "caption": lambda: place.captions(step.captions),
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
    for step in dict.fromkeys(earlier for each in wanted for earlier in _read(recipe, each)):
        missing = [each for each in outputs(recipe, place, step) if not (each / MANIFEST).is_file()]
        if step not in wanted and missing:
            words, where = " ".join(step.words), missing[0]
            yield Problem("--stage", f"{step} comes first and has not finished in {where}: captune run RECIPE {words}")


def before(recipe: Recipe, step: Step) -> list[Step]:
    """What a run does before a step: what it reads, and the same of an earlier arm whose data turned out equal, from
    which it will be taken. As all refined data stand it is known which arms those are.
    """
    found = _read(recipe, step)
    if step.stage in OF_A_SEED:
        place = RunDir(Path(recipe.run_dir).resolve(), tuple(recipe.seeds))
        seed = recipe.seeds[0] if step.seed is None else step.seed
        earlier = list(recipe.arms)[: list(recipe.arms).index(step.arm)]
        equal = [arm for arm in alike(recipe, place, step.arm, seed) if arm in earlier]
        found += [replace(step, arm=arm) for arm in equal[:1]]
    return found


def _read(recipe: Recipe, step: Step) -> list[Step]:
    """What a step reads of others."""
    arm = step.arm
    made = [Step("sample")] if recipe.sample.out else []
    base = [Step("assemble")] if recipe.assemble.wanted else []
    return {
        "sample": lambda: [],
        "assemble": lambda: made,
        "caption": lambda: made,
        "refine": lambda: [Step("caption", captions=recipe.captions_of(arm))],
        "train": lambda: [*made, *base, *([Step("refine", arm)] if recipe.has_data(arm) else [])],
        "merge": lambda: [*base, Step("train", arm, step.seed)],
        "evaluate": lambda: [*made, Step("merge", arm, step.seed)],
        "compare": lambda: [each for each in _every(recipe) if each.stage == "evaluate"],
    }[step.stage]()


def alike(recipe: Recipe, place: RunDir, arm: str, seed: int) -> list[str]:
    """Other arms whose training is the same work: equal settings, and rows that are equal in their order, ids and
    texts, however they came about. Of data that are not refined yet nothing is known.
    """
    mine = recipe.training(arm, seed)
    others = [other for other in recipe.arms if other != arm and recipe.training(other, seed) == mine]
    if not mine.runs("align"):
        return others
    rows = same.rows_digest(place.dataset(arm)) if others else ""
    return [other for other in others if rows and same.rows_digest(place.dataset(other)) == rows]


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
            from pipelines.caption import found
            from pipelines.caption import stage as caption

            if step.captions:
                say(f"{step}:")
            if config := recipe.captioning(step.captions):
                caption.run(recipe.dataset, directory, config, restart=restart)
            else:
                found.run(recipe.dataset, directory, recipe.caption, restart=restart)
        case "refine":
            from pipelines.refine import stage as refine

            captions = place.captions(recipe.captions_of(arm))
            refine.run(captions, directory, recipe.arms[arm], arm=arm, restart=restart)
        case _:
            _of_a_model(recipe, place, step, restart)


def _of_a_model(recipe: Recipe, place: RunDir, step: Step, restart: bool) -> None:
    """Training, merging or asking the model of one arm and seed; what another arm has done alike is taken from it."""
    seed = recipe.seeds[0] if step.seed is None else step.seed
    walk, base = place.walk(step.arm, seed), Path(recipe.train.model)
    adapter, merged = walk.adapter.directory, walk.merged.directory
    others = [place.walk(arm, seed) for arm in alike(recipe, place, step.arm, seed)]
    twins = partial(_twins, place, step, walk, others)
    taken = partial(same.taken, step.stage, what=str(step), restart=restart)
    # What a stage's inputs are is read from large files, so nobody asks where there is nobody to take from.
    match step.stage:
        case "train":
            from pipelines.train import stage as loop

            train, data = recipe.training(step.arm, seed), place.dataset(step.arm)
            wanted = loop.wanted(data, base, adapter, train, restart=restart) if others else {}
            if not (others and taken(twins(wanted), adapter, wanted)):
                loop.run(data, base, adapter, train, arm=walk.directory.name, restart=restart)
        case "merge":
            from pipelines.adapters import config, merge

            wanted = config.decides(model_identity(base), identity(adapter), recipe.merge) if others else {}
            if not (others and taken(twins(wanted), merged, wanted)):
                merge.run(base, adapter, merged, recipe.merge, restart=restart)
        case "evaluate":
            from pipelines.evaluate import stage as evaluate
            from ray_jobs.evaluate import served

            with evaluate.kept(served(merged, recipe.serve, walk.directory.name)) as service:
                for benchmark, asked in recipe.evaluate.each().items():
                    answers = walk.evaluation(benchmark).directory
                    wanted = evaluate.wanted(asked, merged) if others else {}
                    if not (others and taken(twins(wanted, benchmark), answers, wanted)):
                        evaluate.run(answers, asked, evaluate.Served(merged, service), restart=restart)


def _twins(
    place: RunDir, step: Step, mine: Walk, others: list[Walk], wanted: dict[str, Any], benchmark: str = ""
) -> Iterator[same.Twin]:
    """Other arms' models that are trained alike, each with the inputs by which its part is this step's work."""
    for walk in others:
        if step.stage == "train":
            data = wanted["data"] | ({"align": identity(place.dataset(walk.arm))} if "align" in wanted["data"] else {})
            yield walk, walk.adapter, wanted | {"data": data}
        elif step.stage == "merge" and _one_is_the_others(mine, walk):
            yield walk, walk.merged, wanted | {"adapter": identity(walk.adapter.directory)}
        elif step.stage == "evaluate" and not walk.evaluation(benchmark).manifest.get("errors"):
            yield walk, walk.evaluation(benchmark), wanted


def _one_is_the_others(one: Walk, other: Walk) -> bool:
    """Whether two models have the same adapter, one of them having taken it."""
    return other.directory.name == one.adapter.manifest.get(SAME_AS) or (
        one.directory.name == other.adapter.manifest.get(SAME_AS)
    )
