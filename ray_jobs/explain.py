"""Split the gain of an arm over its causes: new captions, each operator of its filters."""

from __future__ import annotations

if __name__ == "__main__":
    import _from_path  # noqa: F401

import shutil
from collections.abc import Collection
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pipelines import cost, preflight
from pipelines.attribution.causes import CAPTIONS, MIXING, ArmData, Cause, Ledger, alone, find, process_of
from pipelines.attribution.config import TOGETHER
from pipelines.attribution.plan import Plan, plan
from pipelines.attribution.shapley import Coalition
from pipelines.errors import UserError
from pipelines.files import write_text
from pipelines.manifest import MANIFEST, identity, open_stage, read_json, write_json
from pipelines.progress import say
from pipelines.refine.config import MixConfig
from pipelines.rundir import RECIPE, InnerRun, RunDir, Walk
from ray_jobs import _ending, _hours, _plan, _start, cli, hallway, run, side_by_side
from ray_jobs._options import RESTART, Command, Option, parse, reading
from ray_jobs.evaluate import serving
from ray_jobs.recipe import NONE, ArmConfig, Recipe

if TYPE_CHECKING:
    from pipelines.attribution.explanation import Measured
    from pipelines.refine.operators import Process

COMMAND = Command(
    "explain",
    "Split the gain of a finished run's arm over its causes: new captions, each filter. Trains what is needed for it.",
    (
        reading("run directory", "--run_dir", "RUN", key="run_dir"),
        Option("--arm", "NAME", "whose gain; needed where the run has several", default=""),
        Option("--dry-run", about="say how many models would be trained, and the hours; write nothing"),
        RESTART,
    ),
    reads=("run_dir", "explain"),
    first="--run_dir",
    example="captune explain runs/sample --arm enhanced --explain.budget 16",
)
_SAME = ("align", "instruct_data", "subset", "train", "without")
"""Keys of an arm in which it must not differ from its baseline."""


def main(argv: list[str]) -> int:
    """`captune explain RUN [--arm NAME]`."""
    root = Path(parse(COMMAND, argv)[0].run_dir)
    if not RunDir(root).recipe.is_file():
        raise UserError(f"{root}: holds no run (no {RECIPE})")
    saved = str(RunDir(root).recipe)
    asked, options = parse(COMMAND, ["--config", saved, *argv])
    whole = parse(run.COMMAND, [saved])[0]
    whole = replace(whole, run_dir=str(root.resolve()), explain=asked.explain)
    split = Split(whole, _arm(whole, options.arm))
    if options.dry_run:
        return _dry_run(split, options)
    from pipelines.attribution import explanation

    found = split.run(restart=options.restart)
    _ending.tell(options, found, explanation.table(found))
    say(f"explain: {split.place.explanation(split.arm)}; next: captune report {root}")
    return 0


def _arm(whole: Recipe, named: str) -> str:
    """The arm to explain."""
    if not whole.arms:
        raise UserError(f"{whole.run_dir}: the run has no arms, so no gain")
    baseline = whole.compare.baseline_among(whole.arms)
    others = [arm for arm in whole.arms if arm != baseline]
    if named and named not in others:
        why = "is the baseline itself" if named == baseline else "is no arm of the run"
        raise UserError(f"--arm {named} {why}; its others are {', '.join(others) or 'none'}")
    if not named and len(others) != 1:
        raise UserError(f"--arm: name one of {', '.join(others)}" if others else "the run has a single arm, so no gain")
    return named or others[0]


def _dry_run(split: Split, options: SimpleNamespace) -> int:
    trainings, known = split.foreseen()
    hours = split.hours(trainings)
    seeds = len(split.whole.seeds)
    text = f"{split.arm}: {len(split.causes)} causes: {', '.join(cause.name for cause in split.causes)}\n"
    text += f"{'' if known else 'at most '}{trainings * seeds} models to train"
    text += f" ({trainings} coalitions, {seeds} seeds)" if seeds > 1 else ""
    text += "" if known else "; fewer, where operators change no row, which is tried first"
    text += f"\nhours: {_hours.total([hours]) if hours else 'unknown; no stage of the run has counted its own'}"
    result = {"causes": [vars(cause) for cause in split.causes], "coalitions": trainings, "models": trainings * seeds}
    return _ending.tell(options, {**result, "at_most": not known, "hours": hours}, text)


def without_training(whole: Recipe, arm: str) -> dict[str, Any] | None:
    """The explanation of an arm's gain over captions and filters, each as one cause, where the run has an arm with its
    captions alone and one with its filters alone; else None.
    """
    baseline = whole.compare.baseline_among(whole.arms)
    base, own = whole.arms[baseline], whole.arms[arm]
    same = all(getattr(base, key) == getattr(own, key) for key in (*_SAME, "mix"))
    if not same or own.recipe is None or base.recipe is not None:
        return None
    if (whole.captions_of(arm), own.text) == (whole.captions_of(baseline), base.text):
        return None
    split = Split(replace(whole, explain=replace(whole.explain, filters=TOGETHER)), arm)
    return split.of_the_run()


class Split:
    """One arm's gain, and the runs below the run directory that split it.

    Args:
        whole: the recipe of the run, as resolved there.
        arm: whose gain.

    Raises:
        UserError: the run is not finished, or arm and baseline differ in something else than data, or in nothing.
    """

    def __init__(self, whole: Recipe, arm: str) -> None:
        self.whole, self.arm = whole, arm
        self.baseline = whole.compare.baseline_among(whole.arms)
        self.place = RunDir(Path(whole.run_dir), tuple(whole.seeds))
        self.inner = InnerRun(self.place.explaining(arm), self.place.seeds, self.place)
        self._require_finished()
        own, base = whole.arms[arm], whole.arms[self.baseline]
        for key in _SAME:
            if getattr(own, key) != getattr(base, key):
                raise UserError(
                    f"arms.{arm}.{key}: differs from that of the baseline {self.baseline}, and of the causes of a gain "
                    "only captions, mixing and filters can be told apart"
                )
        self.base, self.own = self._data_of(self.baseline), self._data_of(arm)
        self.without_rows: set[Coalition] = set()
        self.causes = find(self.base, self.own, together=whole.explain.filters == TOGETHER)

    def run(self, *, restart: bool = False) -> dict[str, Any]:
        """Train what is needed, write `explanation.json`, and return it. Complete already, it is only read.

        Raises:
            UserError: the directory holds the explanation of another state of the run; or the budget is too small.
            WorkFailed: a stage failed; the same again continues.
        """
        from pipelines.attribution import explanation

        stage = open_stage(self.inner.root, "explain", self._inputs(), restart=restart, grows=("budget",))
        path = self.place.explanation(self.arm)
        if stage.complete and path.is_file():
            return dict(read_json(path))
        if stage.grown or stage.complete:
            stage.accept()
        self._make([each for each in alone(self.causes) if each not in self._arms], ["refine"])
        asked = self._plan()
        self._say(asked)
        self._train(asked)
        found = explanation.explain(asked, self._measure(asked), self.whole.compare)
        write_json(path, found)
        stage.finish(trained=found["trained"], gain=found["gain"])
        return found

    def of_the_run(self) -> dict[str, Any] | None:
        """The explanation where every coalition is an arm of the run; else None."""
        from pipelines.attribution import explanation

        if not set(alone(self.causes)) <= self._arms.keys():
            return None
        asked = self._plan()
        return None if asked.untrained else explanation.explain(asked, self._measure(asked), self.whole.compare)

    def foreseen(self) -> tuple[int, bool]:
        """Coalitions still to train, and whether that is sure: it is once every operator has been tried alone."""
        if all((self._dataset(each) / MANIFEST).is_file() for each in alone(self.causes)):
            names = map(self._name, self._plan().untrained.values())
            return sum(not all(self._answered(name, seed) for seed in self.whole.seeds) for name in names), True
        return min(2 ** len(self.causes) - len(self._arms), self.whole.explain.budget), False

    def hours(self, trainings: int) -> cost.Hours:
        """Of so many coalitions, at the rates of the run itself."""
        rates = _hours.rates(self.place.root, self.whole)
        rows = read_json(self.place.comparison)["count"]
        parts = []
        for kind, work in (("train", self._samples()), ("merge", 1), ("evaluate", rows)):
            if (rate := rates.get(kind)) is not None:
                parts.append(cost.scaled(rate.hours_of(work), trainings * len(self.whole.seeds)))
        return cost.rounded(cost.added(parts))

    def _samples(self) -> int:
        train = self.whole.training(self.arm, self.whole.seeds[0])
        walk = self.place.walk(self.arm, self.whole.seeds[0])
        return sum(
            phase["steps"] * phase["batch"]
            for name in ("align", "instruct")
            if train.runs(name) and (phase := walk.adapter.manifest["inputs"]["config"][name])
        )

    def _require_finished(self) -> None:
        if not self.place.comparison.is_file():
            raise UserError(f"{self.place.root}: no finished comparison there; captune run {self.place.recipe} first")
        for arm in (self.baseline, self.arm):
            for seed in self.whole.seeds:
                self._scores(self.place.walk(arm, seed))

    def _inputs(self) -> dict[str, Any]:
        """What the explanation is of: the two arms' answers, which data, models and settings have decided."""
        bench = self.whole.evaluate.benchmark
        return {
            "answers": {
                f"{arm} {seed}": identity(self.place.walk(arm, seed).evaluation(bench).directory)
                for arm in (self.baseline, self.arm)
                for seed in self.whole.seeds
            },
            "process": self.own.process,
            "causes": [cause.name for cause in self.causes],
            "compare": vars(self.whole.compare) | {"pilot": None, "overlap": None, "examples": None},
            "seed": self.whole.explain.seed,
            "budget": self.whole.explain.budget,
        }

    def _plan(self) -> Plan:
        from pipelines.attribution.causes import rows_of

        ledger = Ledger(self.causes, {each: rows_of(self._dataset(each)) for each in alone(self.causes)})
        return plan(ledger, self._arms, self.whole.explain.budget, self.whole.explain.seed)

    def _data_of(self, arm: str) -> ArmData:
        from pipelines.refine.operators import read_recipe

        config = self.whole.arms[arm]
        process = read_recipe(config.recipe) if config.recipe else []
        mix = None if config.mix.by == NONE else config.mix
        return ArmData(arm, (self.whole.captions_of(arm), config.text), mix, process)

    def _data(self, coalition: Coalition) -> ArmData:
        """What a coalition makes; mixing has nothing to mix where there are no new captions."""
        kinds = {self.causes[number].kind for number in coalition}
        captions = self.own.captions if CAPTIONS in kinds else self.base.captions
        mix = self.own.mix if MIXING in kinds and captions == self.own.captions else self.base.mix
        return ArmData(self._name(coalition), captions, mix, process_of(coalition, self.causes, self.own.process))

    @cached_property
    def _arms(self) -> dict[Coalition, str]:
        """Coalitions that are arms of the run -> their names."""
        found: dict[Coalition, str] = {}
        own = self.whole.arms[self.arm]
        for arm, config in self.whole.arms.items():
            if any(getattr(config, key) != getattr(own, key) for key in _SAME):
                continue
            data = self._data_of(arm)
            coalition = frozenset(number for number, cause in enumerate(self.causes) if self._does(data, cause))
            if data == replace(self._data(coalition), arm=arm):
                found.setdefault(coalition, arm)
        return found

    def _does(self, data: ArmData, cause: Cause) -> bool:
        if cause.positions:
            return all(self.own.process[place] in data.process for place in cause.positions)
        return data.captions == self.own.captions if cause.kind == CAPTIONS else data.mix == self.own.mix

    def _dataset(self, coalition: Coalition) -> Path:
        arm = self._arms.get(coalition)
        return self.place.dataset(arm) if arm else self.inner.dataset(self._name(coalition))

    def _name(self, coalition: Coalition) -> str:
        """`causes-1-3`: the numbers are those of `explanation.json`, from 1 on."""
        return "-".join(["causes", *(str(number + 1) for number in sorted(coalition))]) if coalition else "causes-none"

    def _train(self, asked: Plan) -> None:
        """Every model that is missing. Where a coalition keeps no row there is no alignment, as in the control arm."""
        for each in asked.untrained.values():
            filters = all(self.causes[number].kind in (CAPTIONS, "filter") for number in each)
            if filters and not len(asked.ledger.kept(each)):
                self.without_rows.add(each)
        self._make(asked.untrained.values(), ["refine", "train", "merge", "evaluate"])

    def _make(self, coalitions: Collection[Coalition], stages: Collection[str]) -> None:
        """The stages of some coalitions. A model that has answered is thrown away: there may be dozens of them."""
        inner = self._inner_recipe(coalitions)
        steps = [step for step in hallway.steps(inner) if step.stage in stages]
        todo = [step for step in steps if not self._done(inner, step)]
        for step in steps:
            if step.stage == "merge" and step not in todo:  # a kill came between the answers and this
                shutil.rmtree(hallway.output(inner, self.inner, step), ignore_errors=True)
        if not todo:
            return
        preflight.require(_plan.problems(inner, todo))
        run.keep(inner, self.inner)

        def work(step: hallway.Step) -> None:
            hallway.perform(inner, self.inner, step, restart=False)
            if step.stage == "evaluate":
                shutil.rmtree(self.inner.walk(step.arm, self._seed(step)).merged.directory)

        with _start.ray_cluster(demands=_plan.demands(inner, todo)), serving():
            side_by_side.perform(inner, todo, work)

    def _done(self, inner: Recipe, step: hallway.Step) -> bool:
        """What is complete; and what came before answers that are all there."""
        if step.stage == "refine":
            return (hallway.output(inner, self.inner, step) / MANIFEST).is_file()
        return self._answered(step.arm, self._seed(step))

    def _answered(self, name: str, seed: int) -> bool:
        manifest = self.inner.walk(name, seed).evaluation(self.whole.evaluate.benchmark).manifest
        return bool(manifest) and not manifest["errors"]

    def _seed(self, step: hallway.Step) -> int:
        return self.whole.seeds[0] if step.seed is None else step.seed

    def _inner_recipe(self, coalitions: Collection[Coalition]) -> Recipe:
        """The run's recipe with coalitions for arms."""
        arms = {self._name(each): self._arm_config(each) for each in coalitions}
        return self.whole.below(self.inner.root, arms)

    def _arm_config(self, coalition: Coalition) -> ArmConfig:
        """The arm that a coalition is; its filters are written where a run keeps them."""
        own, data = self.whole.arms[self.arm], self._data(coalition)
        if coalition in self.without_rows:
            return ArmConfig(align=NONE, instruct_data=own.instruct_data, train=own.train)
        file = self.inner.filters(data.arm)
        if data.process:
            _write_filters(file, data.process)
        captions, text = data.captions
        mix = data.mix if isinstance(data.mix, MixConfig) else MixConfig()
        return replace(own, captions=captions, text=text, mix=mix, recipe=str(file) if data.process else None)

    def _measure(self, asked: Plan) -> Measured:
        """The scores of all coalitions that are asked for, question by question in the baseline's order."""
        import numpy as np

        from pipelines.attribution.explanation import Measured
        from pipelines.evaluate.statistics import Pictures

        walks = {data: self._walks(self.inner, self._name(each)) for data, each in asked.untrained.items()}
        for each, arm in self._arms.items():
            walks[asked.ledger.data_of(each)] = self._walks(self.place, arm)
        bench = self.whole.evaluate.benchmark
        first = self._scores(self.place.walk(self.baseline, self.whole.seeds[0]))["questions"]
        ids = [row["question_id"] for row in first]
        scores, sources = {}, {}
        for each in asked.wanted:
            mine = walks[asked.ledger.data_of(each)]
            tables = [{row["question_id"]: row["score"] for row in self._scores(walk)["questions"]} for walk in mine]
            scores[each] = np.array([[float(table[key]) for key in ids] for table in tables])
            sources[each] = [str(walk.evaluation(bench).directory.relative_to(self.place.root)) for walk in mine]
        pictures = Pictures.named([row["image_id"] for row in first])
        trained = len(asked.untrained) * len(self.whole.seeds)
        drawn, seeds = bool(read_json(self.place.comparison).get("drawn")), list(self.whole.seeds)
        return Measured(self.baseline, self.arm, bench, drawn, seeds, scores, pictures, sources, trained)

    def _walks(self, place: RunDir, arm: str) -> list[Walk]:
        return [place.walk(arm, seed) for seed in self.whole.seeds]

    def _scores(self, walk: Walk) -> dict[str, Any]:
        from pipelines.evaluate.stage import read_scores

        return read_scores(walk.evaluation(self.whole.evaluate.benchmark).directory)

    def _say(self, asked: Plan) -> None:
        nothing = [cause.name for number, cause in enumerate(self.causes) if number not in asked.ledger.live]
        if nothing:
            say(f"explain {self.arm}: {', '.join(nothing)} changed no row")
        untrained, seeds = len(asked.untrained), len(self.whole.seeds)
        how = "exact" if asked.game.exact else f"{len(asked.game.weights_GNC)} orders drawn"
        say(f"explain {self.arm}: {len(asked.ledger.live)} causes, {untrained * seeds} models to train, {how}")


def _write_filters(path: Path, process: Process) -> None:
    import yaml

    text = yaml.safe_dump({"process": process}, sort_keys=False, allow_unicode=True)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
