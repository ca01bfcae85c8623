"""Everything that cannot work, found before anything starts: a function for each stage, and one for the machine.

What makes an input usable is known by the room that uses it; here each is asked under the key that names it, and all
answers are collected. Nothing heavy is imported and nothing is written.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from pipelines import machine
from pipelines.caption.config import CaptionConfig
from pipelines.demand import Demand, Node
from pipelines.errors import NotReady, Problem, UserError
from pipelines.evaluate.benchmark import Question
from pipelines.evaluate.config import CompareConfig, EvaluateConfig
from pipelines.files import refusal
from pipelines.mgm.assemble_config import AssembleConfig
from pipelines.overlapping import overlapping
from pipelines.refine.config import RefineConfig
from pipelines.train import trackers
from pipelines.train.config import TrainConfig

_KEY = re.compile(r"(?P<key>[a-z_]+(\.[a-zA-Z_-]+)+)(: | )(?P<rest>.*)", re.DOTALL)
_SHIPPED = Path(__file__).parent / "recipes"


def require(problems: Iterable[Problem]) -> None:
    """Raise `NotReady` with all problems, each said once; nothing when there are none."""
    if found := list(dict.fromkeys(problems)):
        raise NotReady(found)


def found(key: str, check: Callable[[], object]) -> Iterator[Problem]:
    """The problem that a check raises as a `UserError`, under `key` unless its message begins with one of its own."""
    try:
        check()
    except UserError as error:
        own = _KEY.fullmatch(str(error))
        if own and own["key"].split(".")[0] == key.split(".")[0]:
            yield Problem(own["key"], own["rest"])
        else:
            yield Problem(key, str(error).removeprefix(f"{key}: "))


def dataset(path: str, key: str = "dataset") -> Iterator[Problem]:
    """Image-text pairs in any format."""
    from pipelines.formats import READABLE, open_dataset

    if path:
        yield from found(key, lambda: open_dataset(path))
    else:
        yield Problem(key, f"is not set; a dataset is {READABLE}")


def caption(config: CaptionConfig) -> Iterator[Problem]:
    """The captioner, and the CLIP that chooses."""
    from pipelines.blip2 import checkpoint

    def captioner() -> None:
        if directory := checkpoint.locate(config.model):
            checkpoint.check(directory, config.prompt, config.max_new_tokens)

    yield from found("caption.model", captioner)
    if clip := config.candidates.clip_model:
        key = "caption.candidates.clip_model"

        def chooser() -> None:
            if directory := checkpoint.locate(clip, key):
                checkpoint.check_clip(directory)

        yield from found(key, chooser)


def refine(config: RefineConfig, section: str = "refine", *, done: bool = False) -> Iterator[Problem]:
    """The Data-Juicer recipe: that it can be read, and that its operators can be built.

    Building them imports Data-Juicer, which takes seconds; the recipes that come with captune are built by its tests.

    Args:
        section: `arms.NAME` for an arm's.
        done: the recipe has done its work already.
    """
    from pipelines.refine.operators import build, read_recipe

    if without := config.without:
        yield from found(f"{section}.without", lambda: overlapping(without, f"{section}.without"))
    if not (recipe := config.recipe):
        return
    unread = [Problem(f"{section}.recipe", p.message) for p in found("refine.recipe", lambda: read_recipe(recipe))]
    yield from unread
    if not unread and not done and Path(recipe).parent != _SHIPPED:
        for problem in found("refine.recipe", lambda: build(read_recipe(recipe))):
            yield Problem(f"{section}.recipe", problem.message)


def train(config: TrainConfig, model: str, *, made: bool = False) -> Iterator[Problem]:
    """Base model, instructions, and the packages of the strategy and the tracker.

    Args:
        made: the base model is made by the run itself.
    """
    if made and not model:
        yield Problem("train.model", "is not set; assemble writes the base there")
    elif made:
        yield from output(model, "train.model")
    else:
        yield from base_model(model)
    if config.runs("instruct"):
        assert config.instruct_data is not None
        yield from dataset(config.instruct_data, "train.instruct_data")
    elif config.align.steps == 0:
        yield Problem("train.align.steps", "is 0, and there is no instruct phase: nothing to train")
    if without := config.without:
        yield from found("train.without", lambda: overlapping(without, "train.without"))
    yield from found("train.tracker", lambda: trackers.require(config.tracker))
    if config.strategy != "ddp" and importlib.util.find_spec("deepspeed") is None:
        yield Problem("train.strategy", f"{config.strategy} needs DeepSpeed, which is not installed")


def assemble(config: AssembleConfig) -> Iterator[Problem]:
    """Every part of a base."""
    if not config.wanted:
        yield Problem("assemble.language_model", "is not set; a base takes it, clip and openclip, or from_mgm")
    for key, check in config.checks() if config.wanted else ():
        yield from found(key, check)


def base_model(model: str, key: str = "train.model") -> Iterator[Problem]:
    """An MGM that can be trained, merged into, checked or served."""
    from pipelines.mgm.directory import check_model_directory

    if model:
        yield from found(key, lambda: check_model_directory(model))
    else:
        yield Problem(key, "is not set; name the directory of an MGM (captune convert makes one)")


def records(directory: str, key: str = "--input") -> Iterator[Problem]:
    """A directory of sample records whose stage has finished."""
    from pipelines.manifest import require_finished
    from pipelines.records import shard_paths

    yield from found(key, lambda: require_finished(directory))
    yield from found(key, lambda: shard_paths(Path(directory)))


def adapter(directory: str, key: str = "--adapter") -> Iterator[Problem]:
    """A finished adapter."""
    from pipelines.manifest import require_finished
    from pipelines.mgm.adapter import has_lora

    yield from found(key, lambda: require_finished(directory))
    yield from found(key, lambda: has_lora(Path(directory)))


def evaluate(config: EvaluateConfig, *, scored: bool = False, key: str = "evaluate") -> Iterator[Problem]:
    """Annotations, with OCR tokens if they are asked for, and the picture of every question.

    Args:
        scored: scores are wanted, so that a split whose answers are withheld will not do.
        key: where a recipe names this benchmark's files.
    """
    for problem in _evaluate(config, scored):
        yield replace(problem, key=problem.key.replace("evaluate", key, 1))


def _evaluate(config: EvaluateConfig, scored: bool) -> Iterator[Problem]:
    from pipelines.evaluate.stage import find_images, read_questions, withheld

    if config.ocr_tokens and config.ocr and not Path(config.ocr).is_file():
        yield Problem("evaluate.ocr", f"{config.ocr}: no such file")
        config = replace(config, ocr_tokens=False)  # the questions themselves can be looked at all the same
    questions: list[Question] = []
    yield from found("evaluate.annotations", lambda: questions.extend(read_questions(config)))
    if questions and scored and withheld(questions):
        yield Problem("evaluate.annotations", f"{config.annotations}: the answers of this split are withheld: no score")
    yield from found("evaluate.images", lambda: find_images(config, questions))


def compare(config: CompareConfig) -> Iterator[Problem]:
    """What the comparison leaves out once."""
    if file := config.overlap:
        yield from found("compare.overlap", lambda: overlapping(file, "compare.overlap"))


def output(path: str | Path, key: str = "--output", size: int = 0, what: str = "") -> Iterator[Problem]:
    """A directory that can be written, on a disk with room for `size` bytes of `what`."""
    place = Path(path).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        yield Problem(key, f"{path}: {place} is a file, not a directory")
    elif not os.access(place, os.W_OK | os.X_OK):
        yield Problem(key, f"{path}: {place} cannot be written")
    elif (free := shutil.disk_usage(place).free) < size:
        yield Problem(key, f"{path}: {what} take {size / 1e9:.1f} GB, the disk of {place} has {free / 1e9:.1f} GB free")


def writing(path: str | Path, key: str) -> Iterator[Problem]:
    """A directory in which a file can be written: made and tried, because permissions on paper are not all that shared
    storage goes by.
    """
    probe = Path(path).absolute() / f".preflight-{os.getpid()}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as file:
            file.write(b"0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        yield Problem(key, refusal(error, path))
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def size_of(model: str) -> int:
    """Bytes of a model's weights; 0 where there is none."""
    return sum(file.stat().st_size for file in Path(model).glob("*.safetensors")) if model else 0


def here(config: CaptionConfig | None = None, demands: Sequence[Demand] = ()) -> Iterator[Problem]:
    """What this machine does not have, for a command that starts Ray on it: Ray would wait for ever."""
    yield from resources([Node(machine.cpus(), len(machine.cards()))], "this machine", config, demands)


def resources(
    nodes: Sequence[Node], where: str, config: CaptionConfig | None = None, demands: Sequence[Demand] = ()
) -> Iterator[Problem]:
    """What `nodes` do not have: for captioning, which makes do with fewer replicas, and for what makes do with
    nothing less.
    """
    from pipelines.caption.sizing import check_room

    if config is not None:
        cpus, gpus = sum(node.cpus for node in nodes), max((node.gpus for node in nodes), default=0.0)
        yield from found("caption", lambda: check_room(config, cpus, gpus, where))
    for demand in demands:
        yield from demand.missing(nodes, where)
