"""What `captune run` would do: everything that stands in its way, and the way itself, stage by stage. Writes nothing.

A stage's fingerprint is known before the stage has run, because it is made of what goes in; so a directory that belongs
to another recipe is found before the first stage begins, and a run of which everything is done is known as such without
Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import preflight
from pipelines.caption.config import CaptionConfig
from pipelines.cost import Hours
from pipelines.demand import Demand
from pipelines.errors import Problem, UserError
from pipelines.manifest import CLAIM, MANIFEST, StageOutput, identity, look, read_json
from pipelines.modelfiles import CONFIG
from pipelines.progress import clock
from pipelines.refine.config import RefineConfig
from pipelines.rundir import RunDir, Walk
from pipelines.train.config import PhaseConfig, TrainConfig
from ray_jobs import _hours, _start, hallway
from ray_jobs.recipe import Recipe

if TYPE_CHECKING:
    from pipelines.evaluate.benchmark import Question
    from pipelines.evaluate.config import EvaluateConfig


@dataclass
class Step:
    """One stage of a run.

    Attributes:
        stage: e.g. `train original`.
        directory: that it writes.
        state: `complete`, `continues` (a kill left half of it), `grows` (the dataset has new rows) or `starts`.
        rows: that go through it, where that is known before it begins.
        work: what it has to do, in words; empty when it is complete.
        seconds: that it should take, where a stage can say.
        memory: bytes of the largest process, where a stage can say.
        hours: of nodes, CPUs and cards by group, where somebody has measured such work.
        measured: where.
    """

    stage: str
    directory: str
    state: str
    rows: int | None = None
    work: str = ""
    seconds: float | None = None
    memory: int | None = None
    hours: Hours = field(default_factory=dict)
    measured: str = ""


def demands(recipe: Recipe, steps: Sequence[hallway.Step] = ()) -> list[Demand]:
    """What the steps, or all stages, ask of the machines; captioning, which adapts to them, is asked by itself."""
    steps = steps or hallway.steps(recipe)
    filtering = dict.fromkeys(step.arm for step in steps if step.stage == "refine" and recipe.arms[step.arm].recipe)
    found = [recipe.arms[arm].demand(f"arms.{arm}") for arm in filtering]
    for stage, section in (("train", recipe.train), ("evaluate", recipe.serve)):
        if any(step.stage == stage for step in steps):
            found.append(section.demand())
    return found


def problems(recipe: Recipe, steps: Sequence[hallway.Step] = (), *, here: bool = True) -> Iterator[Problem]:
    """Everything that stands in the way of the steps, or of a whole run. What the sample world will bring is not missed
    before it is drawn.

    Args:
        here: Ray would be started on this machine, unless there is a cluster.
    """
    place = RunDir(Path(recipe.run_dir), tuple(recipe.seeds))
    whole, stages = not steps, {step.stage for step in steps or hallway.steps(recipe)}
    for stage in ("caption", "assemble", "train", "evaluate", "merge", "compare"):
        for problem in _of(stage, recipe, whole) if stage in stages else ():
            if not (whole and _will_be_drawn(recipe, problem.key)):
                yield problem
    for arm, config in recipe.arms.items():
        if any(step.stage == "refine" and step.arm == arm for step in steps or hallway.steps(recipe)):
            done = (place.dataset(arm) / MANIFEST).is_file()
            yield from preflight.refine(config, f"arms.{arm}", done=done)
    if here:
        yield from _start.lacking(recipe.captioner if "caption" in stages else None, demands(recipe, steps))
    weights = _merged_models(recipe, place) if "merge" in stages else (0, "")
    yield from preflight.output(recipe.run_dir, "run_dir", *weights)
    if recipe.sample.out and "sample" in stages:
        yield from preflight.output(recipe.sample.out, "sample.out")


def _of(stage: str, recipe: Recipe, whole: bool) -> Iterator[Problem]:
    """What stands in the way of one stage, whatever the arm."""
    made = recipe.assemble.wanted
    if stage == "caption":
        yield from preflight.dataset(recipe.dataset)
        for name in recipe.sets:
            yield from _of_captions(recipe, name)
    elif stage == "assemble":
        yield from preflight.assemble(recipe.assemble)
        yield from preflight.output(recipe.train.model, "train.model") if not whole else ()
    elif stage == "train":
        yield from preflight.train(recipe.train, recipe.train.model, made=made and whole)
        for arm, own in recipe.arms.items():
            if own.instruct_data:
                yield from preflight.dataset(own.instruct_data, f"arms.{arm}.instruct_data")
    elif stage == "merge":
        yield from preflight.base_model(recipe.train.model) if not whole else ()
    elif stage == "evaluate":
        for name, config in recipe.evaluate.each().items():
            yield from preflight.evaluate(config, scored=True, key=recipe.evaluate.key(name))
    elif stage == "compare":
        yield from preflight.compare(recipe.compare)


def _of_captions(recipe: Recipe, name: str) -> Iterator[Problem]:
    """What stands in the way of one caption set, under the key that gives the value."""
    if config := recipe.captioning(name):
        for problem in preflight.caption(config):
            own: Any = recipe.captions.get(name)
            for part in problem.key.split(".")[1:]:
                own = (own or {}).get(part)
            key = problem.key.removeprefix("caption")
            yield Problem(f"captions.{name}{key}", problem.message) if own else problem


def unwritable(recipe: Recipe) -> Iterator[Problem]:
    """Places of a run that nothing can be written to, found by writing there."""
    yield from preflight.writing(recipe.run_dir, "run_dir")
    if recipe.sample.out:
        yield from preflight.writing(recipe.sample.out, "sample.out")
    if recipe.assemble.wanted:
        yield from preflight.writing(Path(recipe.train.model).parent, "train.model")


def _will_be_drawn(recipe: Recipe, key: str) -> bool:
    """The key names something in a sample world that is not drawn yet."""
    if not recipe.sample.out or (Path(recipe.sample.out) / MANIFEST).is_file():
        return False
    value: Any = recipe
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
    return isinstance(value, str) and Path(recipe.sample.out).resolve() in Path(value).resolve().parents


def _merged_models(recipe: Recipe, place: RunDir) -> tuple[int, str]:
    """Bytes of the merged models that are still to be written."""
    base = sum(preflight.size_of(model) for model in _base(recipe))
    walks = [place.walk(arm, seed) for arm in recipe.arms for seed in recipe.seeds]
    missing = sum(not walk.merged.directory.exists() for walk in walks)
    return base * missing, f"{missing} merged models"


def _base(recipe: Recipe) -> list[str]:
    """The base, or what it will be made of."""
    return [str(part) for part in recipe.assemble.parts().values()] if recipe.assemble.wanted else [recipe.train.model]


def steps(recipe: Recipe, *, restart: bool, measure: bool) -> tuple[list[Step], list[Problem]]:
    """The stages in their order, and those whose directories belong to other runs.

    Args:
        restart: what lies there is thrown away.
        measure: load the captioner and measure it, if there is something to caption; foresee training's memory, and
            what the comparison can show.
    """
    plan = _Plan(restart, measure)
    place = RunDir(Path(recipe.run_dir).resolve(), tuple(recipe.seeds))
    if recipe.sample.out:
        plan.sample(recipe)
    if recipe.assemble.wanted:
        plan.assemble(recipe)
    captions = {name: plan.caption(recipe, place, name) for name in recipe.sets}
    for arm in filter(recipe.has_data, recipe.arms):
        plan.refine(recipe, place, arm, captions[recipe.captions_of(arm)])
    for seed in recipe.seeds:
        for arm in recipe.arms:
            plan.walk(recipe, place, place.walk(arm, seed), seed)
    if measure and len(recipe.arms) > 1:
        plan.compare(recipe, place)
        plan.explain(recipe, place)
    return plan.steps, plan.problems


class _Plan:
    """The steps so far, and what stands in their way."""

    def __init__(self, restart: bool, measure: bool) -> None:
        self.restart, self.measure = restart, measure
        self.steps: list[Step] = []
        self.problems: list[Problem] = []
        self.identities: dict[Path, str] = {}
        self.data: dict[str, dict[str, Any]] = {}
        self.forecasts: dict[str, list[Any]] = {}
        self.questions: dict[str, list[Question]] = {}

    def sample(self, recipe: Recipe) -> None:
        """The sample world."""
        from pipelines.sample.world import inputs

        size = recipe.sample
        rows = size.pairs + size.instructions + size.questions
        self._add("sample", Path(size.out or ""), lambda: inputs(size), rows, f"{rows:,} pictures")

    def assemble(self, recipe: Recipe) -> None:
        """The base."""
        from pipelines.mgm.assemble_config import inputs

        parts = ", ".join(str(part) for part in recipe.assemble.parts().values())
        self._add("assemble", Path(recipe.train.model), lambda: inputs(recipe.assemble), work=f"from {parts}")

    def caption(self, recipe: Recipe, place: RunDir, name: str) -> Step:
        """Captioning of one set; while it is to be done, the dataset is counted and some of it captioned to measure."""
        from pipelines.blip2 import checkpoint
        from pipelines.caption import found
        from pipelines.caption.stage import GROWS, inputs
        from pipelines.formats import open_dataset

        config = recipe.captioning(name)

        def wanted() -> dict[str, Any]:
            dataset = open_dataset(recipe.dataset, recipe.caption.reading)
            if config is None:
                return found.inputs(dataset, recipe.caption)
            return inputs(dataset, checkpoint.resolve(config.model), config)

        work = "" if config else "the captions as found"
        step = self._add(f"caption {name}".strip(), place.captions(name), wanted, work=work, grows=GROWS)
        if step.state == "complete":
            return step
        drawn = not _will_be_drawn(recipe, "dataset")
        step.rows = None if drawn else recipe.sample.pairs
        if config and drawn and self.measure and checkpoint.locate(config.model) is not None:
            _estimate(step, recipe.dataset, config)
        return step

    def refine(self, recipe: Recipe, place: RunDir, arm: str, captions: Step) -> None:
        """An arm's data."""
        from pipelines.refine.operators import read_recipe
        from pipelines.refine.stage import inputs

        config = recipe.arms[arm]
        process = read_recipe(config.recipe) if config.recipe else []
        self.data[arm] = inputs(recipe.captions_of(arm), process, config)
        self._add(
            f"refine {arm}",
            place.dataset(arm),
            lambda: inputs(self._identity(place.captions(recipe.captions_of(arm))), process, config),
            captions.rows,
            ", ".join(_told(config, len(process))),
        )

    def walk(self, recipe: Recipe, place: RunDir, walk: Walk, seed: int) -> None:
        """One model's way: training, merge, evaluation."""
        from pipelines.adapters.config import decides
        from pipelines.train.stage import as_first_started, inputs

        train, base = recipe.training(walk.arm, seed), Path(recipe.train.model)
        adapter, merged = walk.adapter.directory, walk.merged.directory
        phases = _phases(train, place.dataset(walk.arm))

        def wanted() -> dict[str, Any]:
            data = {name: self._identity(path) for name, path in phases.items()}
            return inputs(self._model(base, adapter), data, as_first_started(train, adapter))

        counts = [getattr(train, name) for name in phases]
        in_epochs = any(phase.epochs for phase in counts)
        rows = None if in_epochs else sum(phase.steps * phase.per_step(train.workers) for phase in counts)
        work = " + ".join(f"{_length(phase)} of {name}" for name, phase in zip(phases, counts, strict=True))
        step = self._add(f"train {walk.name}", adapter, wanted, rows, work)
        if step.state != "complete" and (other := self._equal(recipe, place, walk, seed)):
            step.rows, step.work = None, f"as {other}: their data are equal"
        elif self.measure and step.state != "complete" and (base / CONFIG).is_file():
            self._foresee(step, train, base, phases)
        self._add(
            f"merge {walk.name}",
            merged,
            lambda: decides(self._model(base, adapter), self._identity(adapter), recipe.merge),
            work="one model directory",
        )
        merging = self.steps[-1]
        for config in recipe.evaluate.each().values():
            self._evaluate(recipe, walk, config, merging)

    def _equal(self, recipe: Recipe, place: RunDir, walk: Walk, seed: int) -> str:
        """An earlier arm whose data will be equal, or are; empty where that cannot be known yet."""
        arms, key = list(recipe.arms), self.data.get(walk.arm)
        earlier = arms[: arms.index(walk.arm)]
        found = set(hallway.alike(recipe, place, walk.arm, seed))
        train = recipe.training(walk.arm, seed)
        if key is not None:
            found |= {arm for arm in earlier if self.data.get(arm) == key and recipe.training(arm, seed) == train}
        return next((arm for arm in earlier if arm in found), "")

    def _foresee(self, step: Step, train: TrainConfig, base: Path, phases: dict[str, Path]) -> None:
        """What a training takes of a card, seeds not told apart."""
        from pipelines.train import forecast

        key = repr((replace(train, seed=0), phases))
        if key not in self.forecasts:
            data = {name: str(path) for name, path in phases.items()}
            self.forecasts[key] = forecast.forecast(train, base, data)
        found = self.forecasts[key]
        step.memory = max((each.prediction.card for each in found), default=None)
        step.work += "".join(f"; {line}" for line in forecast.brief(found))

    def _evaluate(self, recipe: Recipe, walk: Walk, config: EvaluateConfig, merging: Step) -> None:
        """Questions to a merged model; whose answers lie there is known once there is one."""
        from pipelines.evaluate.stage import find_images, inputs
        from pipelines.modelfiles import model_identity

        name, directory = f"evaluate {walk.name}", walk.evaluation(config.benchmark).directory
        name += "" if config.benchmark == recipe.evaluate.benchmark else f" ({config.benchmark})"
        questions = self._questions(recipe, config)
        rows = recipe.sample.questions if questions is None else len(questions)
        work = f"{config.benchmark} through {recipe.serve.replicas} replica(s)"
        if merging.state != "complete":
            state = "continues" if directory.exists() and not self.restart else "starts"
            self.steps.append(Step(name, str(directory), state, rows, work))
            return

        def wanted() -> dict[str, Any]:
            asked = questions or []
            images = find_images(config, asked)
            return inputs(config, asked, images, model_identity(walk.merged.directory))

        step = self._add(name, directory, wanted, rows, work)
        if step.state == "complete" and walk.evaluation(config.benchmark).manifest["errors"]:
            step.state, step.work = "continues", "questions without an answer are asked again"

    def compare(self, recipe: Recipe, place: RunDir) -> None:
        """The verdict: which differences it will be able to show."""
        from pipelines.evaluate import power

        step = Step("compare", str(place.root), "complete" if place.comparison.is_file() else "starts", None, "")
        self.steps.append(step)
        questions = self._questions(recipe, recipe.evaluate)
        if step.state == "complete" or questions is None:
            return
        step.rows, pictures = len(questions), len({question.image_id for question in questions})
        foreseen = power.foresee(step.rows, pictures, len(recipe.arms), len(recipe.seeds), recipe.compare)
        step.work = f"{pictures:,} pictures; {foreseen}"

    def _questions(self, recipe: Recipe, config: EvaluateConfig) -> list[Question] | None:
        """A benchmark's, read once for all models; None while the sample world is to be drawn."""
        from pipelines.evaluate.stage import read_questions

        name = config.benchmark
        if name not in self.questions and not _will_be_drawn(recipe, f"{recipe.evaluate.key(name)}.annotations"):
            self.questions[name] = read_questions(config)
        return self.questions.get(name)

    def explain(self, recipe: Recipe, place: RunDir) -> None:
        """Gains that are split over their causes; how many models that takes is known once each filter has been tried
        alone (`captune explain --dry-run`).
        """
        for arm in recipe.explain.arms:
            state = "complete" if place.explanation(arm).is_file() else "starts"
            most = recipe.explain.budget * len(recipe.seeds)
            self.steps.append(Step(f"explain {arm}", str(place.explaining(arm)), state, work=f"at most {most} models"))

    def _add(
        self,
        name: str,
        directory: Path,
        wanted: Callable[[], dict[str, Any]],
        rows: int | None = None,
        work: str = "",
        grows: tuple[str, ...] = (),
    ) -> Step:
        """One more step; what its fingerprint is made of is asked only when something lies in its directory."""
        step = Step(name, str(directory), "starts", rows, work)
        self.steps.append(step)
        if self.restart or not directory.exists():
            return step
        try:
            output = look(directory, name.split()[0], wanted(), grows=grows)
        except UserError as error:
            self.problems.append(Problem(name, str(error)))
            return step
        self.identities[directory] = output.fingerprint
        step.state = _state(output)
        if output.complete:
            step.work = ""
            step.rows = _rows(output.manifest) or rows
        return step

    def _model(self, base: Path, adapter: Path) -> str:
        """Identity of the base; of one that is to be made again, what the adapter was trained on: the same parts give
        the same base.
        """
        from pipelines.modelfiles import model_identity

        if (base / MANIFEST).is_file() or not (adapter / CLAIM).is_file() or any(base.glob("*.safetensors")):
            return model_identity(base)
        return str(read_json(adapter / CLAIM)["inputs"]["model"])

    def _identity(self, directory: Path) -> str:
        """Of a stage's directory, also of one that is not complete yet; of a directory that is not there, nothing."""
        if directory in self.identities:
            return self.identities[directory]
        return identity(directory) if directory.exists() else ""


def _phases(train: TrainConfig, dataset: Path) -> dict[str, Path]:
    """Phase -> its data, whether they are there yet or not."""
    phases = {"align": dataset} if train.runs("align") else {}
    if train.runs("instruct"):
        assert train.instruct_data is not None
        phases["instruct"] = Path(train.instruct_data).resolve()
    return phases


def _told(config: RefineConfig, operators: int) -> Iterator[str]:
    """How an arm's data come about, in words."""
    yield f"text: {config.text}" if config.mix.by == "none" else f"texts mixed by {config.mix.by}"
    yield f"{operators} operators"
    if config.subset.rows:
        yield f"{config.subset.rows:,} rows drawn"


def _length(phase: PhaseConfig) -> str:
    return f"{phase.epochs:g} epoch(s)" if phase.epochs else f"{phase.steps} steps"


def _state(output: StageOutput) -> str:
    return "complete" if output.complete else "grows" if output.grown else "continues" if output.resumed else "starts"


def _rows(manifest: dict[str, Any]) -> int | None:
    rows = manifest.get("rows_in")
    return rows if isinstance(rows, int) else None


def _estimate(step: Step, dataset: str, config: CaptionConfig) -> None:
    """What captioning says of itself."""
    from pipelines.caption.estimate import estimate

    found = estimate(dataset, config)
    step.rows = found["rows"]
    step.memory = found.get("memory_per_actor")
    most = max(config.actors, config.max_actors)
    step.seconds = next((3600 * row["hours"] for row in found["actors"] if row["actors"] == most), None)
    step.work = f"{most} replica(s)"
    demand, on_card = config.demand(), found["sample"]["device"] != "cpu"
    if step.seconds is not None and on_card == bool(demand.gpus):
        hours = step.seconds / 3600 * most
        step.hours = {demand.group: {"cpu_hours": hours * demand.cpus, "gpu_hours": hours * demand.gpus}}
        step.measured = f"{found['sample']['rows']} rows on this machine"


def price(plan: list[Step], recipe: Recipe, measured: Path) -> None:
    """Fill in the hours of what is to be done, at the rates of the finished stages of a run; a whole stage's, where it
    continues.
    """
    rates = _hours.rates(measured, recipe)
    for step in plan:
        kind = step.stage.split()[0]
        work = 1 if kind == "merge" else step.rows
        rate = rates.get(step.stage) or rates.get(kind)
        if step.state != "complete" and work and rate:
            step.hours, step.measured = rate.hours_of(work), rate.where


def bill(plan: list[Step]) -> str:
    """What is to be done will take so many hours, by group, and what that stands on."""
    todo = [step for step in plan if step.state != "complete"]
    known = [step for step in todo if step.hours]
    if not known:
        return "hours: unknown; --measured RUN takes the rates of a finished run" if todo else ""
    lines = [f"hours: {_hours.total(step.hours for step in known)}"]
    lines += [f"  {step.stage}: {_hours.total([step.hours])}, as measured in {step.measured}" for step in known]
    if unknown := [step.stage for step in todo if not step.hours]:
        lines.append(f"  unknown: {', '.join(unknown)}")
    return "\n".join(lines)


def describe(plan: list[Step]) -> str:
    """The plan for a person."""
    cells = [("stage", "state", "rows", "time", "memory", "what")]
    cells += [
        (
            step.stage,
            step.state,
            "" if step.rows is None else f"{step.rows:,}",
            "" if step.seconds is None else clock(step.seconds),
            "" if step.memory is None else f"{step.memory / 1e9:.1f} GB",
            step.work or step.directory,
        )
        for step in plan
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(5)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), row[1].ljust(widths[1]), *(row[n].rjust(widths[n]) for n in (2, 3, 4)), row[5]]
        )
        for row in cells
    ]
    return "\n".join([*(line.rstrip() for line in lines), *filter(None, [bill(plan)])])


def as_json(plan: list[Step], found: list[Problem]) -> dict[str, Any]:
    """The plan for a program."""
    return {"steps": [asdict(step) for step in plan], "problems": [asdict(problem) for problem in found]}
