"""Walk the whole hallway for every arm of a recipe."""

from __future__ import annotations

if __name__ == "__main__":
    import _from_path  # noqa: F401

import time
from dataclasses import replace
from pathlib import Path

from pipelines.errors import UserError, WorkFailed
from pipelines.files import write_text
from pipelines.progress import clock, say
from pipelines.rundir import RunDir
from ray_jobs import _start, cli
from ray_jobs._options import CONFIG_OPTION, RESTART, WHOLE, Command, lasting, parse
from ray_jobs.recipe import Recipe, absolute, recipe_yaml

COMMAND = Command(
    "run",
    "Walk the whole hallway for every arm of a recipe: what is complete is skipped, what is half done continues.",
    (CONFIG_OPTION, RESTART),
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
    started = time.monotonic()
    with _start.ray_cluster():
        run(recipe, restart=options.restart)
    say(f"done in {clock(time.monotonic() - started)}: open {RunDir(Path(recipe.run_dir)).report}")
    return 0


def run(recipe: Recipe, *, restart: bool = False) -> None:
    """Every stage of every arm and seed, then the comparison and the report. Ray is running.

    Raises:
        WorkFailed: a stage failed; or, when all is written, so many requests that they forbid a verdict.
    """
    from pipelines.caption import stage as caption
    from pipelines.evaluate import compare
    from pipelines.refine import stage as refine
    from pipelines.report import page
    from pipelines.sample.world import write_world

    place = RunDir(Path(recipe.run_dir).resolve(), tuple(recipe.seeds))
    place.root.mkdir(parents=True, exist_ok=True)
    if recipe.sample.out:
        write_world(recipe.sample.out, recipe.sample, restart=restart)
    recipe = keep(recipe, place)
    caption.run(recipe.dataset, place.captions, recipe.caption, restart=restart)
    for arm, config in recipe.arms.items():
        refine.run(place.captions, place.dataset(arm), config, arm=arm, restart=restart)
    comparisons = {seed: _train_and_compare(recipe, place, seed, restart) for seed in recipe.seeds}
    if all(comparisons.values()):
        _write_comparison(place, comparisons)
    page.run(place.root)
    reasons = [reason for found in comparisons.values() if found for reason in compare.withheld(found)]
    if reasons:
        raise WorkFailed("; ".join(reasons))


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


def _train_and_compare(recipe: Recipe, place: RunDir, seed: int, restart: bool) -> dict:
    """Train, merge, serve and evaluate every arm with one seed; the comparison of the arms, empty for a single arm."""
    from pipelines.adapters import merge
    from pipelines.evaluate import compare
    from pipelines.evaluate import stage as evaluate
    from pipelines.train import stage as loop
    from ray_jobs.evaluate import served

    base, train = Path(recipe.train.model), replace(recipe.train, seed=seed)
    evaluations = {}
    for arm in recipe.arms:
        walk = place.walk(arm, seed)
        adapter, merged = walk.adapter.directory, walk.merged.directory
        loop.run(place.dataset(arm), base, adapter, train, arm=walk.directory.name, restart=restart)
        merge.run(base, adapter, merged, recipe.merge, restart=restart)
        evaluations[arm] = walk.evaluation(recipe.evaluate.benchmark).directory
        endpoint = evaluate.Served(merged, served(merged, recipe.serve))
        evaluate.run(evaluations[arm], recipe.evaluate, endpoint, restart=restart)
    return compare.run(evaluations, place.comparing(seed), recipe.compare) if len(evaluations) > 1 else {}


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
