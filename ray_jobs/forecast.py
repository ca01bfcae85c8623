"""Foretell what a recipe will find: its arms at a few small parts of the rows, and what these say of the whole."""

from __future__ import annotations

if __name__ == "__main__":
    import _from_path  # noqa: F401

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipelines import cost, preflight
from pipelines.errors import UserError
from pipelines.ladder.law import Point, extrapolate
from pipelines.lock import hold
from pipelines.manifest import write_json
from pipelines.progress import say
from pipelines.rundir import RunDir, Stage, Walk, collect
from ray_jobs import _ending, _hours, _plan, _start, cli, hallway, run, side_by_side
from ray_jobs._options import CONFIG_OPTION, RESTART, WHOLE, Command, Option, lasting, parse
from ray_jobs.evaluate import serving
from ray_jobs.recipe import ArmConfig, Recipe

COMMAND = Command(
    "forecast",
    "Foretell a recipe's gain, hours and cost from its arms at a sixteenth, an eighth and a quarter of the rows.",
    (
        CONFIG_OPTION,
        Option("--dry-run", about="say how many models would be trained, and the hours; write nothing"),
        Option("--measured", "RUN", "with --dry-run: a finished run, at whose rates the hours are foretold", path=True),
        RESTART,
    ),
    reads=WHOLE,
    first="--config",
    example="captune forecast sample_seeds --run_dir runs/mine",
)
_LEAST_ROWS = 8
"""A rung of fewer rows teaches nothing that a larger one could continue."""


def main(argv: list[str]) -> int:
    """`captune forecast RECIPE`, or `--config RECIPE`."""
    recipe, options = parse(COMMAND, argv)
    if len(recipe.arms) < 2:
        raise UserError("captune forecast needs a recipe with a baseline and another arm: captune forecast sample")
    lasting(recipe.run_dir, "run_dir")
    ladder = Ladder(recipe)
    preflight.require(_plan.problems(recipe))
    if options.dry_run:
        return _dry_run(ladder, options)
    found = ladder.run(restart=options.restart)
    _ending.tell(options, found, table(found))
    say(f"forecast: {ladder.place.forecast}; the whole: captune run {options.recipes[-1] if options.recipes else ''}")
    return 0


def _dry_run(ladder: Ladder, options: SimpleNamespace) -> int:
    recipe, parts = ladder.recipe, ladder.recipe.forecast.rungs
    models = len(recipe.arms) * len(parts) * len(recipe.seeds)
    share = sum(1 / part for part in parts)
    hours: cost.Hours = {}
    if options.measured:
        plan, _ = _plan.steps(recipe, restart=True, measure=False)
        _plan.price(plan, recipe, Path(options.measured))
        of = {"caption": 1 / min(parts), "evaluate": len(parts), "merge": len(parts)}
        hours = cost.rounded(
            cost.added(cost.scaled(step.hours, of.get(step.stage.split()[0], share)) for step in plan if step.hours)
        )
    text = f"{models} models to train, which together take {share:.3g} of the training of the whole recipe\n"
    text += (
        f"hours: {_hours.total([hours])}" if hours else "hours: unknown; --measured RUN takes those of a finished run"
    )
    result = {"models": models, "share_of_training": share, "hours": hours}
    return _ending.tell(options, result, text)


class Ladder:
    """A recipe, and the run below its run directory whose arms are its arms in small.

    Rows and steps of both phases shrink alike, so that a rung costs what it says, and the whole is the top of the same
    ladder.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.baseline = recipe.compare.baseline_among(recipe.arms)
        self.place = RunDir(Path(recipe.run_dir).resolve(), tuple(recipe.seeds))
        self.inner = RunDir(self.place.forecasting, tuple(recipe.seeds))
        self.parts = sorted(recipe.forecast.rungs, reverse=True)
        self.pairs = self.inner.root / "pairs"
        self.asked = recipe.evaluate.each()[recipe.evaluate.benchmark]

    def run(self, *, restart: bool = False) -> dict[str, Any]:
        """Draw, caption, refine, train, ask; then extrapolate, write `forecast.json`, and return it.

        Returns:
            `baseline` and `arms` as `law.extrapolate` gives them; `points`, the rungs: `arm`, `share`, `seed`, `rows`,
            `accuracy`, `loss`; `rows` of the dataset, `benchmark`, `seeds`, `confidence`; `hours` by group of nodes of
            the whole recipe at the rungs' rates, and `spent`, what the rungs took.

        Raises:
            UserError: too few rows for the smallest rung, or another recipe's forecast lies there.
            WorkFailed: a stage failed; the same again continues.
        """
        from pipelines.ladder import rows

        self.inner.root.mkdir(parents=True, exist_ok=True)
        hold(self.inner.root)
        for step in hallway.steps(self.recipe):
            if step.stage in ("sample", "assemble"):  # the whole recipe's own, which it will find done
                hallway.perform(self.recipe, self.place, step, restart=False)
        config = self.recipe.forecast
        reading = self.recipe.caption.reading
        drawn = rows.draw(self.recipe.dataset, self.pairs, self.parts[-1], config.seed, reading, restart=restart)
        self._require_rows(drawn["rows_out"])
        self._walk(self.rungs({}), ("caption", "refine"), restart)
        kept = {arm: self._kept(arm, self.parts[-1]) for arm in self.recipe.arms}
        self._walk(self.rungs(kept), ("refine", "train", "merge", "evaluate"), restart)
        points = self._points()
        found = {
            **extrapolate(points, self.baseline, config.confidence, config.seed),
            "points": [asdict(point) | {"rows": self._kept(point.arm, round(1 / point.share))} for point in points],
            "rows": drawn["rows_in"],
            "benchmark": self.recipe.evaluate.benchmark,
            "seeds": self.recipe.seeds,
            "confidence": config.confidence,
            **self._hours(drawn["rows_in"]),
        }
        write_json(self.place.forecast, found)
        return found

    def rungs(self, kept: dict[str, int]) -> Recipe:
        """The recipe's arms at every part of the rows; at the largest alone while it is not known how many those are.

        Args:
            kept: rows that each arm keeps of the largest part.
        """
        arms: dict[str, ArmConfig] = {}
        for part in self.parts if kept else self.parts[-1:]:
            for arm, own in self.recipe.arms.items():
                rows = round(kept.get(arm, 0) * self.parts[-1] / part)
                if kept and self.recipe.has_data(arm):
                    self._require_rows(kept[arm], f" that arms.{arm} keeps")
                fewer = replace(own.subset, rows=rows) if rows and part != self.parts[-1] else own.subset
                arms[_name(arm, part)] = replace(own, subset=fewer, train=_in_small(self.recipe, arm, 1 / part))
        return replace(self.recipe.below(self.inner.root, arms), dataset=str(self.pairs))

    def _require_rows(self, rows: int, which: str = "") -> None:
        """Enough of the largest rung's rows for the smallest one.

        Raises:
            UserError: there are not.
        """
        smallest = int(rows * self.parts[-1] / self.parts[0])
        if smallest < _LEAST_ROWS:
            raise UserError(
                f"forecast.rungs: of the rows of {self.recipe.dataset}{which} a {self.parts[0]}th are {smallest}, and "
                f"a model in small needs {_LEAST_ROWS}; use parts that are larger, or run the whole"
            )

    def _walk(self, recipe: Recipe, stages: tuple[str, ...], restart: bool) -> None:
        """The stages of all rungs. A model that has answered is thrown away."""
        every = [step for step in hallway.steps(recipe) if step.stage in stages]
        steps = [step for step in every if restart or not self._done(step)]
        for step in every:
            if step.stage == "merge" and step not in steps:  # a kill came between the answers and this
                shutil.rmtree(hallway.output(recipe, self.inner, step), ignore_errors=True)
        run.keep(recipe, self.inner)

        def work(step: hallway.Step) -> None:
            hallway.perform(recipe, self.inner, step, restart=restart)
            if step.stage == "evaluate":
                walk = self._walk_of(step.arm, step.seed)
                self._likelihood(walk)
                shutil.rmtree(walk.merged.directory)

        with _start.ray_cluster(recipe.captioner, _plan.demands(recipe, steps)), serving():
            if any(step.stage == "evaluate" for step in steps):
                side_by_side.perform(recipe, steps, work)
            else:  # whether the trained models are this recipe's
                for step in steps:
                    work(step)

    def _likelihood(self, walk: Walk) -> None:
        from serve import likelihood

        likelihood.run(walk.merged.directory, walk.likelihood.directory, self.asked, self.recipe.serve)

    def _done(self, step: hallway.Step) -> bool:
        """A model that has been asked everything is needed no more; that it was trained so, its training tells."""
        from serve import likelihood

        if step.stage not in ("merge", "evaluate"):
            return False
        return likelihood.asked(self._walk_of(step.arm, step.seed).likelihood.directory, self.asked)

    def _walk_of(self, arm: str, seed: int | None) -> Walk:
        return self.inner.walk(arm, self.recipe.seeds[0] if seed is None else seed)

    def _kept(self, arm: str, part: int) -> int:
        """Rows that a rung trains on; none, of an arm that has no data."""
        manifest = Stage(self.inner.dataset(_name(arm, part))).manifest
        return int(manifest.get("kept", 0))

    def _points(self) -> list[Point]:
        found = []
        for part in self.parts:
            for arm in self.recipe.arms:
                for seed in self.recipe.seeds:
                    walk = self._walk_of(_name(arm, part), seed)
                    scores = walk.evaluation(self.recipe.evaluate.benchmark).manifest
                    loss = walk.likelihood.manifest["loss"]
                    found.append(Point(arm, 1 / part, seed, scores["accuracy"], loss))
        return found

    def _hours(self, rows: int) -> dict[str, cost.Hours]:
        """Of the whole recipe at the rates of its rungs; and of the rungs."""
        plan, _ = _plan.steps(self.recipe, restart=True, measure=False)
        for step in plan:
            if step.stage.split()[0] in ("caption", "refine"):
                step.rows = rows
        _plan.price(plan, self.recipe, self.inner.root)
        spent = cost.added(cost.of(stage.manifest) for _, stage in collect(self.inner.root).stages())
        return {"hours": cost.rounded(cost.added(step.hours for step in plan)), "spent": cost.rounded(spent)}


def _name(arm: str, part: int) -> str:
    return f"{arm}-{part}"


def _in_small(recipe: Recipe, arm: str, share: float) -> dict[str, Any]:
    """An arm's own settings of training, with that share of the steps; of epochs in its own rows there are as many."""
    train, own = recipe.training(arm), dict(recipe.arms[arm].train)
    for name in ("align", "instruct"):
        phase = getattr(train, name)
        if not train.runs(name):
            continue
        if phase.epochs and name == "align":
            continue
        less = {"epochs": phase.epochs * share} if phase.epochs else {"steps": max(1, round(phase.steps * share))}
        own[name] = {**own.get(name, {}), **less}
    return own


def table(found: dict[str, Any]) -> str:
    """The forecast for a person."""
    level = f"{100 * found['confidence']:g} %"
    lines = []
    for arm, each in found["arms"].items():
        accuracy, loss = each["accuracy"], each["loss"]
        lines.append(
            f"{arm}: {100 * accuracy['value']:.1f} % on all {found['rows']:,} rows ({level} interval "
            f"{100 * accuracy['interval'][0]:.1f} to {100 * accuracy['interval'][1]:.1f}); "
            f"a right answer {loss['value']:.2f} nats"
        )
    for arm, each in found["arms"].items():
        if "gain" in each:
            low, high = each["gain"]["interval"]
            lines.append(
                f"{arm} minus {found['baseline']}: {100 * each['gain']['value']:+.1f} points, {level} interval "
                f"{100 * low:+.1f} to {100 * high:+.1f}, for one run"
            )
    lines.append("rows     " + "  ".join(f"{arm:>22}" for arm in found["arms"]))
    for share in dict.fromkeys(point["share"] for point in found["points"]):
        cells = []
        for arm in found["arms"]:
            mine = [point for point in found["points"] if point["arm"] == arm and point["share"] == share]
            score = 100 * sum(point["accuracy"] for point in mine) / len(mine)
            cells.append(f"{score:6.1f} %, {sum(point['loss'] for point in mine) / len(mine):5.2f} nats".rjust(22))
        lines.append(f"1/{round(1 / share):<6} " + "  ".join(cells))
    if found["hours"]:
        spent = _hours.total([found["spent"]])
        lines.append(f"hours of the whole: {_hours.total([found['hours']])}; spent on this: {spent}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
