"""Walk the whole hallway for every arm of a recipe."""

from __future__ import annotations

if __name__ == "__main__":
    import _from_path  # noqa: F401

import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from pipelines import connection, preflight
from pipelines.errors import UserError, WorkFailed
from pipelines.evaluate.config import CompareConfig
from pipelines.evaluate.registry import title
from pipelines.files import write_text
from pipelines.lock import LOCK, hold, release
from pipelines.manifest import MANIFEST, read_json, write_json
from pipelines.progress import clock, say
from pipelines.rundir import RunDir
from ray_jobs import _ending, _log, _plan, _refusals, _start, cli, hallway, side_by_side
from ray_jobs._options import CONFIG_OPTION, RESTART, WHOLE, Command, Option, lasting, parse, required
from ray_jobs.evaluate import serving
from ray_jobs.recipe import Recipe, absolute, recipe_yaml
from ray_jobs.recipe_file import require_same

COMMAND = Command(
    "run",
    "Walk the whole hallway for every arm of a recipe: what is complete is skipped, what is half done continues.",
    (
        CONFIG_OPTION,
        Option("--stage", "NAME", f"do one alone, as the whole would: {', '.join(hallway.STAGES)}", default=""),
        Option("--arm", "NAME", "with --stage: of this arm alone", default=""),
        Option("--seed", "N", "with --stage: of this seed alone", number=True),
        Option("--set", "NAME", "with --stage caption: this caption set alone", default=""),
        Option("--dry-run", about="say what stands in the way and what would run; write nothing"),
        Option("--measured", "RUN", "with --dry-run: a finished run, at whose rates the hours are foretold", path=True),
        Option("--preflight", about="look at everything that a run needs, and try to write where it writes; for jobs"),
        Option("--log", "FILE", "append what is printed to it, too; for jobs", path=True, default=""),
        Option("--recipe-is", "DIGEST", "end before anything begins when RECIPE is another; for jobs", default=""),
        RESTART,
    ),
    reads=WHOLE,
    first="--config",
    example="captune run sample --run_dir runs/mine --train.lora.rank 8",
)


PATIENCE_S = 30.0
"""While another stage's job notes down the recipe."""


def main(argv: list[str]) -> int:
    """`captune run RECIPE`, or `--config RECIPE`."""
    recipe, options = parse(COMMAND, argv)
    if options.recipe_is:
        require_same(required(options.recipes and options.recipes[-1], "a recipe", "run"), options.recipe_is)
    if options.log:
        _log.keep(Path(options.log))
    if not recipe.arms and not options.stage and not options.preflight:
        raise UserError("captune run needs a recipe with arms: captune run sample, or captune run my_recipe.yaml")
    steps = hallway.steps(recipe, options.stage, options.arm, options.seed, options.set)
    lasting(recipe.run_dir, "run_dir")
    lasting(recipe.sample.out or recipe.run_dir, "sample.out")
    if recipe.assemble.wanted:
        lasting(recipe.train.model, "train.model")
    if options.preflight and options.dry_run:
        raise UserError("--preflight tries to write where the run writes, and --dry-run writes nothing; choose one")
    if options.preflight:
        return _preflight(recipe, options)
    if options.dry_run and options.stage:
        raise UserError("--dry-run is of a whole run; leave --stage out")
    if options.dry_run:
        return _dry_run(recipe, options)
    what = str(hallway.Step(options.stage or "run", options.arm, options.seed, options.set))
    with _refusals.kept(_place(recipe), what, options.recipe_is):
        return _part(recipe, steps, options) if options.stage else _whole(recipe, options)


def _preflight(recipe: Recipe, options: SimpleNamespace) -> int:
    """Everything but what this machine has: a cluster that is yet to come will do the work."""
    preflight.require(_plan.problems(recipe, here=False))
    steps, others = _plan.steps(recipe, restart=options.restart, measure=False) if recipe.arms else ([], [])
    preflight.require(others or _plan.unwritable(recipe))
    _refusals.forget(_place(recipe))
    found = {"stages": {step.stage: step.state for step in steps}}
    return _ending.end(options, found, f"preflight: nothing stands in the way of {recipe.run_dir}")


def _whole(recipe: Recipe, options: SimpleNamespace) -> int:
    started = time.monotonic()
    preflight.require(_plan.problems(recipe))
    steps, others = _plan.steps(recipe, restart=options.restart, measure=False)
    preflight.require(others)
    if all(step.state == "complete" for step in steps):
        conclude(recipe, restart=options.restart)
    else:
        run(recipe, restart=options.restart)
    return _end(recipe, options, started)


def _part(recipe: Recipe, steps: list[hallway.Step], options: SimpleNamespace) -> int:
    """The steps of one stage, beside whatever else of this recipe other processes do."""
    started, place = time.monotonic(), _place(recipe)
    demands = _plan.demands(recipe, steps)
    caption = recipe.captioner if options.stage == "caption" else None
    preflight.require([*hallway.unfinished(recipe, place, steps), *_plan.problems(recipe, steps)])
    if options.stage == "compare":
        place.root.mkdir(parents=True, exist_ok=True)
        hold(place.root)
        conclude(recipe, whole=False)
        return _end(recipe, options, started)
    recipe = _take_part(recipe, place, steps)
    with _start.ray_cluster(caption, demands):
        _perform(recipe, place, steps, options.restart)
    found = {str(step): str(hallway.output(recipe, place, step)) for step in steps}
    return _ending.end(options, found, f"{options.stage}: done in {clock(time.monotonic() - started)}")


def _take_part(recipe: Recipe, place: RunDir, steps: list[hallway.Step]) -> Recipe:
    """Hold the steps' directories, and keep the recipe; the run directory is held only meanwhile, so that another arm's
    step can do the same.

    Raises:
        UserError: a whole run, or another process with one of these steps, is at work there.
    """
    place.root.mkdir(parents=True, exist_ok=True)
    hold(place.root, patience_s=PATIENCE_S)
    try:
        recipe = keep(recipe, place)
        for directory in (hallway.output(recipe, place, step) for step in steps):
            if not (directory / MANIFEST).is_file():
                directory.mkdir(parents=True, exist_ok=True)
                hold(directory)
    finally:
        release(place.root)
    return recipe


def _end(recipe: Recipe, options: SimpleNamespace, started: float) -> int:
    place = _place(recipe)
    found = {"run_dir": str(place.root), "report": str(place.report)}
    comparison = {"comparison": read_json(place.comparison)} if len(recipe.arms) > 1 else {}
    made = f"done in {clock(time.monotonic() - started)}: open {place.report}"
    return _ending.end(options, found | comparison, made)


def _dry_run(recipe: Recipe, options: SimpleNamespace) -> int:
    """The plan, or everything that stands in its way; a cluster is asked what it has."""
    found = list(_plan.problems(recipe))
    steps: list[_plan.Step] = []
    if not found:
        steps, found = _plan.steps(recipe, restart=options.restart, measure=True)
        measured = Path(options.measured or recipe.run_dir)
        if options.measured or _place(recipe).recipe.is_file():
            _plan.price(steps, recipe, measured)
    if not found and _start.address():
        with _start.ray_cluster(recipe.captioner, _plan.demands(recipe)):
            connection.connect()
    if options.json or not found:
        _ending.tell(options, _plan.as_json(steps, found), _plan.describe(steps))
    preflight.require(found)
    return 0


def run(recipe: Recipe, *, restart: bool = False) -> None:
    """Every stage of every arm and seed, then the comparison and the report.

    Raises:
        UserError: another process writes to the run directory.
        WorkFailed: a stage failed; or, when all is written, so many requests that they forbid a verdict.
    """
    place, steps = _place(recipe), hallway.steps(recipe)
    place.root.mkdir(parents=True, exist_ok=True)
    hold(place.root)
    for directory in (hallway.output(recipe, place, step) for step in steps):
        if (directory / LOCK).exists():
            hold(directory)  # refused while a stage by itself is at work there
    if recipe.sample.out:
        hallway.perform(recipe, place, steps.pop(0), restart=restart)
        preflight.require(_plan.problems(recipe))  # of what has just been drawn
    recipe = keep(recipe, place)
    with _start.ray_cluster(recipe.captioner, _plan.demands(recipe)):
        _perform(recipe, place, steps[:-1], restart)
    conclude(recipe, restart=restart)


def _perform(recipe: Recipe, place: RunDir, steps: list[hallway.Step], restart: bool) -> None:
    with serving():
        side_by_side.perform(recipe, steps, partial(hallway.perform, recipe, place, restart=restart))


def conclude(recipe: Recipe, *, whole: bool = True, restart: bool = False) -> None:
    """Compare the arms of every seed, explain the gains that the recipe names, and draw the report.

    Args:
        whole: this process does all of the run; one that does the last stage alone trains no further models.

    Raises:
        WorkFailed: when all is written, so many requests failed that they forbid a verdict.
    """
    from pipelines.evaluate import compare
    from pipelines.report import page

    place, benchmarks = _place(recipe), list(recipe.evaluate.each())
    comparisons: dict[int, dict[str, dict]] = {}
    if len(recipe.arms) > 1:
        for seed in recipe.seeds:
            comparisons[seed] = {benchmark: _compare(recipe, place, seed, benchmark) for benchmark in benchmarks}
        _write_comparison(place, comparisons, recipe.compare)
        _explain(recipe, place, whole, restart)
    page.run(place.root)
    every = [found for each in comparisons.values() for found in each.values()]
    reasons = [reason for found in every for reason in compare.withheld(found)]
    if reasons:
        raise WorkFailed("; ".join(reasons))


def _explain(recipe: Recipe, place: RunDir, whole: bool, restart: bool) -> None:
    """Split the gains that the recipe names, and others where the run's own arms suffice for captions and filters."""
    from pipelines.attribution import explanation
    from ray_jobs.explain import Split, without_training

    named = recipe.explain.arms if whole else ()
    for arm in named:
        say(explanation.table(Split(recipe, arm).run(restart=restart)))
    for arm in recipe.arms:
        found = None if arm in named or place.explanation(arm).is_file() else without_training(recipe, arm)
        if found is not None:
            write_json(place.two_by_two(arm), found)
            say(explanation.table(found))
        else:
            place.two_by_two(arm).unlink(missing_ok=True)


def _compare(recipe: Recipe, place: RunDir, seed: int, benchmark: str) -> dict:
    """The arms of one seed on one benchmark."""
    from pipelines.evaluate import compare

    evaluations = {arm: place.walk(arm, seed).evaluation(benchmark).directory for arm in recipe.arms}
    further = "" if benchmark == recipe.evaluate.benchmark else benchmark
    return compare.run(evaluations, place.comparing(seed, further), recipe.compare)


def _place(recipe: Recipe) -> RunDir:
    return RunDir(Path(recipe.run_dir).resolve(), tuple(recipe.seeds))


def keep(recipe: Recipe, place: RunDir) -> Recipe:
    """Write `recipe.yaml`, and beside it the filters that it names, so that the run can be repeated from anywhere with
    this directory alone; returns the recipe as written.

    Its paths are absolute, and an arm's filters are the copy.
    """
    recipe = absolute(recipe)
    for arm, config in recipe.arms.items():
        if config.recipe is not None:
            text, copy = Path(config.recipe).read_text(encoding="utf-8"), place.filters(arm)
            if not copy.is_file() or copy.read_text(encoding="utf-8") != text:
                write_text(copy, text)
            config.recipe = str(copy)
    write_text(place.recipe, recipe_yaml(recipe))
    return recipe


def _write_comparison(place: RunDir, comparisons: dict[int, dict[str, dict]], config: CompareConfig) -> None:
    """Say the results. `comparison.json` is the first benchmark's, and holds those of the others as `also`."""
    benchmarks = list(next(iter(comparisons.values())))
    found = {}
    for name in benchmarks:
        of = f"{title(name)}: " if len(benchmarks) > 1 else ""
        found[name] = _over_seeds({seed: each[name] for seed, each in comparisons.items()}, config, of)
    first, *further = found.values()
    if further or "seeds" in first:
        also = {"also": {each["benchmark"]: each for each in further}} if further else {}
        write_json(place.comparison, first | also)


def _over_seeds(comparisons: dict[int, dict], config: CompareConfig, of: str) -> dict:
    """One benchmark's; with several seeds, the first seed's with all of them summarised in it."""
    from pipelines.evaluate import compare

    for seed, found in comparisons.items():
        for arm in found["differences"]:
            say(of + (f"seed {seed}: " if len(comparisons) > 1 else "") + compare.sentence(found, arm))
    first = next(iter(comparisons.values()))
    if len(comparisons) == 1:
        return first
    seeds = [{**found, "seed": seed} for seed, found in comparisons.items()]
    summary = compare.summarise(list(comparisons.values()), config)
    over_seeds = {**first, "summary": summary, "seeds": seeds}
    for arm in summary["differences"]:
        say(of + compare.summary_sentence(over_seeds, arm))
    return over_seeds


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
