"""Walk the whole hallway for every arm of a recipe."""

from __future__ import annotations

if __name__ == "__main__":
    import _from_path  # noqa: F401

import time
from pathlib import Path
from types import SimpleNamespace

from pipelines import connection, preflight
from pipelines.errors import UserError, WorkFailed
from pipelines.files import write_text
from pipelines.lock import hold
from pipelines.manifest import read_json
from pipelines.progress import clock, say
from pipelines.rundir import RunDir
from ray_jobs import _ending, _plan, _start, cli
from ray_jobs._options import CONFIG_OPTION, RESTART, WHOLE, Command, Option, lasting, parse
from ray_jobs.recipe import Recipe, absolute, recipe_yaml

COMMAND = Command(
    "run",
    "Walk the whole hallway for every arm of a recipe: what is complete is skipped, what is half done continues.",
    (CONFIG_OPTION, Option("--dry-run", about="say what stands in the way and what would run; write nothing"), RESTART),
    reads=WHOLE,
    first="--config",
    example="captune run sample --run_dir runs/mine --train.lora.rank 8",
)


def main(argv: list[str]) -> int:
    """`captune run RECIPE`, or `--config RECIPE`."""
    recipe, options = parse(COMMAND, argv)
    if len(recipe.arms) < 1:
        raise UserError("captune run needs a recipe with arms: captune run sample, or captune run my_recipe.yaml")
    lasting(recipe.run_dir, "run_dir")
    lasting(recipe.sample.out or recipe.run_dir, "sample.out")
    if recipe.assemble.wanted:
        lasting(recipe.train.model, "train.model")
    if options.dry_run:
        return _dry_run(recipe, options)
    started = time.monotonic()
    preflight.require(_plan.problems(recipe))
    steps, others = _plan.steps(recipe, restart=options.restart, measure=False)
    preflight.require(others)
    if all(step.state == "complete" for step in steps):
        conclude(recipe)
    else:
        run(recipe, restart=options.restart)
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
    if not found and _start.address():
        with _start.ray_cluster(recipe.caption, _plan.demands(recipe)):
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
    from pipelines.sample.world import write_world

    place = _place(recipe)
    place.root.mkdir(parents=True, exist_ok=True)
    hold(place.root)
    if recipe.sample.out:
        write_world(recipe.sample.out, recipe.sample, restart=restart)
        preflight.require(_plan.problems(recipe))  # of what has just been drawn
    recipe = keep(recipe, place)
    if recipe.assemble.wanted:
        from pipelines.mgm import assemble

        assemble.run(recipe.assemble, recipe.train.model, restart=restart)
    with _start.ray_cluster(recipe.caption, _plan.demands(recipe)):
        from pipelines.caption import stage as caption
        from pipelines.refine import stage as refine

        caption.run(recipe.dataset, place.captions, recipe.caption, restart=restart)
        for arm, config in recipe.arms.items():
            refine.run(place.captions, place.dataset(arm), config, arm=arm, restart=restart)
        for seed in recipe.seeds:
            _train_and_evaluate(recipe, place, seed, restart)
    conclude(recipe)


def conclude(recipe: Recipe) -> None:
    """Compare the arms of every seed, and draw the report.

    Raises:
        WorkFailed: when all is written, so many requests failed that they forbid a verdict.
    """
    from pipelines.evaluate import compare
    from pipelines.report import page

    place = _place(recipe)
    comparisons = {}
    if len(recipe.arms) > 1:
        for seed in recipe.seeds:
            walks = {arm: place.walk(arm, seed).evaluation(recipe.evaluate.benchmark) for arm in recipe.arms}
            evaluations = {arm: evaluation.directory for arm, evaluation in walks.items()}
            comparisons[seed] = compare.run(evaluations, place.comparing(seed), recipe.compare)
        _write_comparison(place, comparisons)
    page.run(place.root)
    reasons = [reason for found in comparisons.values() for reason in compare.withheld(found)]
    if reasons:
        raise WorkFailed("; ".join(reasons))


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


def _train_and_evaluate(recipe: Recipe, place: RunDir, seed: int, restart: bool) -> None:
    """Train, merge, serve and evaluate every arm with one seed."""
    from pipelines.adapters import merge
    from pipelines.evaluate import stage as evaluate
    from pipelines.train import stage as loop
    from ray_jobs.evaluate import served

    base = Path(recipe.train.model)
    for arm in recipe.arms:
        walk = place.walk(arm, seed)
        adapter, merged = walk.adapter.directory, walk.merged.directory
        train = recipe.training(arm, seed)
        loop.run(place.dataset(arm), base, adapter, train, arm=walk.directory.name, restart=restart)
        merge.run(base, adapter, merged, recipe.merge, restart=restart)
        answers = walk.evaluation(recipe.evaluate.benchmark).directory
        endpoint = evaluate.Served(merged, served(merged, recipe.serve))
        evaluate.run(answers, recipe.evaluate, endpoint, restart=restart)


def _write_comparison(place: RunDir, comparisons: dict[int, dict]) -> None:
    """Say the result; with several seeds, `comparison.json` is the first seed's with all of them summarised in it."""
    from pipelines.evaluate import compare
    from pipelines.manifest import write_json

    for seed, found in comparisons.items():
        for arm in found["differences"]:
            say((f"seed {seed}: " if len(comparisons) > 1 else "") + compare.sentence(found, arm))
    if len(comparisons) > 1:
        first = next(iter(comparisons.values()))
        seeds = [{**found, "seed": seed} for seed, found in comparisons.items()]
        summary = compare.summarise(list(comparisons.values()))
        write_json(place.comparison, {**first, "summary": summary, "seeds": seeds})


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
