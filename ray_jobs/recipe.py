"""A recipe: one YAML file with a section per stage, and each section *is* that stage's config dataclass.

It stands here and not in `pipelines` because it joins the sections of both `pipelines` and `serve`; `recipe_file` reads
its files.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from pipelines.adapters.config import MergeConfig
from pipelines.attribution.config import ExplainConfig
from pipelines.caption.config import CaptionConfig
from pipelines.errors import UserError
from pipelines.evaluate.config import CompareConfig, EvaluateConfig
from pipelines.ladder.config import ForecastConfig
from pipelines.mgm.assemble_config import AssembleConfig
from pipelines.overlap.config import OverlapConfig
from pipelines.refine.config import AnalyzeConfig, RefineConfig
from pipelines.sample.config import SampleConfig
from pipelines.storage import is_remote
from pipelines.train.config import TrainConfig
from serve.config import ServeConfig

RECIPES = Path(__file__).parent.parent / "pipelines" / "recipes"
"""Recipes that come with captune."""
PATHS = (
    "run_dir",
    "dataset",
    "sample.out",
    "assemble.language_model",
    "assemble.clip",
    "assemble.openclip",
    "assemble.from_mgm",
    "caption.model",
    "caption.candidates.clip_model",
    "captions.*.model",
    "captions.*.candidates.clip_model",
    "refine.recipe",
    "arms.*.recipe",
    "refine.without",
    "arms.*.without",
    "arms.*.instruct_data",
    "train.model",
    "train.instruct_data",
    "train.without",
    "evaluate.annotations",
    "evaluate.images",
    "evaluate.ocr",
    "evaluate.also.*.annotations",
    "evaluate.also.*.images",
    "evaluate.also.*.ocr",
    "compare.pilot",
    "compare.overlap",
)
"""Keys that hold a path; `*` stands for every arm, caption set or further benchmark. A model may also be a hub id, a
dataset an address or a pattern."""
_CAPTIONERS = ("caption.model", "caption.candidates.clip_model", "captions.*.model", "captions.*.candidates.clip_model")
"""Those of PATHS that may be hub ids."""
_PLACEHOLDER = re.compile(r"\$\{[^}]*\}?")


FOUND = "found"
"""In place of a caption set's keys: the captions that the dataset has, and no model's."""
NONE = "none"
AUTO = "auto"


@dataclass
class ArmConfig(RefineConfig):
    """An arm of a comparison: its data, and what its training does in a way of its own.

    Attributes:
        text: as in the section refine; `auto`: `recaption`, or `caption` where the caption set is the dataset's own.
        captions: the caption set that its data are made from; empty: the recipe's first, or its only one.
        instruct_data: its own instructions, in place of `train.instruct_data`.
        align: `captions`: training begins with the alignment on its data; `none`: with the instructions, and the arm
            needs no data (a control: what the base and the instructions reach by themselves).
        train: keys of the section `train` with values for this arm alone, e.g. `{method: dora}`. Arms that differ in
            it compare ways of training, and no longer data alone.
    """

    texts: ClassVar[tuple[str, ...]] = (AUTO, *RefineConfig.texts)
    text: str = AUTO
    captions: str = ""
    instruct_data: str | None = None
    align: str = "captions"
    train: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.align not in ("captions", NONE):
            raise UserError(f"refine.align must be captions or none, not '{self.align}'")
        if self.align == NONE:
            unused = {"text": self.text != AUTO, "captions": self.captions, "recipe": self.recipe}
            unused |= {"mix": self.mix.by != NONE, "subset": self.subset.rows}
            for key in (key for key, given in unused.items() if given):
                raise UserError(f"refine.{key} is of no use with align: none, which has no data; leave it out")


_OF_ALL_ARMS = ("model", "instruct_data", "without", "seed", "workers", "cpus_per_worker", "use_gpu")
"""Keys of `train` that no arm has for itself: what they begin with and run on is the same for all."""
_OF_ALL_SETS = ("actors", "max_actors", "cpus_per_actor", "gpus_per_actor", "reading")
"""Keys of `caption` that no caption set has for itself: the dataset and what they run on are the same for all."""


@dataclass
class Recipe:
    """The whole hallway.

    `${run_dir}` in a path stands for `run_dir`, so that a recipe which keeps its data there can be moved by that one
    key; `~` at the beginning of a path is the home directory.

    Attributes:
        run_dir: where the run writes; it explains itself (see the README).
        dataset: image-text pairs in any format captune reads.
        seeds: training is repeated per seed, and the comparison is made per seed.
        side_by_side: most arms and seeds that train, merge or evaluate at once; empty: as many as CPUs and cards have
            room for. Results are the same.
        sample: the embedded sample world.
        assemble: the base MGM from its parts, written to `train.model` before anything else.
        caption: recaptioning with BLIP-2.
        refine: choice of text and filters when `captune refine` is called by itself.
        captions: name -> keys of `caption` with values of their own (`{}`: none), or `found`: the dataset's own
            captions. Each set is made once, whichever arms use it. Empty: one set, as `caption` says.
        arms: name -> choice of captions, text and filters, and of settings of `train` that are the arm's own.
        train: alignment and tuning.
        merge: adapter into model.
        serve: the HTTP endpoint.
        evaluate: the benchmark.
        compare: intervals and tests.
        analyze: which bounds `captune analyze` proposes for filters.
        overlap: when a row counts as a benchmark's.
        explain: which causes a gain has.
        forecast: the recipe in small, and what that says of the whole.
    """

    run_dir: str = "runs/run"
    dataset: str = ""
    seeds: list[int] = field(default_factory=lambda: [0])
    side_by_side: int | None = None
    sample: SampleConfig = field(default_factory=SampleConfig)
    assemble: AssembleConfig = field(default_factory=AssembleConfig)
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    captions: dict[str, Any] = field(default_factory=dict)
    refine: RefineConfig = field(default_factory=RefineConfig)
    arms: dict[str, ArmConfig] = field(default_factory=dict)
    train: TrainConfig = field(default_factory=TrainConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    analyze: AnalyzeConfig = field(default_factory=AnalyzeConfig)
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    explain: ExplainConfig = field(default_factory=ExplainConfig)
    forecast: ForecastConfig = field(default_factory=ForecastConfig)

    def __post_init__(self) -> None:
        if "${" in self.run_dir:
            raise UserError(f"run_dir: '{self.run_dir}' cannot refer to anything")
        if not self.run_dir.strip() or "\n" in self.run_dir:
            raise UserError(f"run_dir: {self.run_dir!r} is no directory's name")
        self.run_dir = os.path.expanduser(self.run_dir)
        _change_texts(self, lambda key, text: expanded(key, text, self.run_dir))
        for config in (self.refine, *self.arms.values()):
            config.recipe = _shipped(config.recipe)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UserError("seeds must be a list of different numbers")
        if self.side_by_side is not None and self.side_by_side < 1:
            raise UserError(f"side_by_side must be at least 1, not {self.side_by_side}")
        for name in self.captions:
            _require_name(f"captions.{name}", name, "a caption set's")
            self.captioning(name)
        for arm in self.arms:
            _require_name(f"arms.{arm}", arm, "an arm's")
            self._settle_text(arm)
            self.training(arm)
        if self.arms:
            baseline = self.compare.baseline_among(self.arms)
            for arm in self.explain.arms:
                if arm not in self.arms or arm == baseline:
                    others = ", ".join(each for each in self.arms if each != baseline) or "none"
                    raise UserError(f"explain.arms: {arm} is no arm beside the baseline {baseline} ({others})")

    @property
    def sets(self) -> list[str]:
        """The caption sets that have to be made; one without a name where the recipe names none, and none where no arm
        has any use for it.
        """
        if self.captions:
            return list(self.captions)
        return [""] if not self.arms or any(self.has_data(arm) for arm in self.arms) else []

    def captioning(self, name: str) -> CaptionConfig | None:
        """The section `caption` as it is for a caption set; None for one whose captions are the dataset's own.

        Raises:
            UserError: a key that there is not, or that all sets share; a value that is not of the key's type.
        """
        own, key = self.captions.get(name) or {}, f"captions.{name}"
        if own == FOUND:
            return None
        if not isinstance(own, dict):
            raise UserError(f"{key}: '{own}' is neither keys of caption with their values, nor {FOUND}")
        if shared := sorted(set(own) & set(_OF_ALL_SETS)):
            raise UserError(f"{key}.{shared[0]} is the same for all caption sets: set caption.{shared[0]}")
        try:
            return _with(self.caption, own, key, "caption")
        except UserError as error:
            raise UserError(re.sub(r"^caption\.", f"{key}.", str(error))) from error

    @property
    def captioner(self) -> CaptionConfig | None:
        """What captioning runs on, the same for every set; None where no model captions anything."""
        return next(filter(None, map(self.captioning, self.sets)), None)

    def captions_of(self, arm: str) -> str:
        """The caption set that an arm's data are made from."""
        return self.arms[arm].captions or next(iter(self.captions), "")

    def has_data(self, arm: str) -> bool:
        """Whether an arm has data of its own: the control has none."""
        return self.arms[arm].align != NONE

    def below(self, run_dir: Path, arms: dict[str, ArmConfig]) -> Recipe:
        """A recipe of further arms for a run of its own, which asks the first benchmark alone and explains nothing."""
        return replace(
            self,
            run_dir=str(run_dir),
            arms=arms,
            evaluate=self.evaluate.each()[self.evaluate.benchmark],
            compare=replace(self.compare, baseline=""),
            explain=replace(self.explain, arms=[]),
        )

    def training(self, arm: str, seed: int | None = None) -> TrainConfig:
        """The section `train` as it is for an arm, with this seed.

        Raises:
            UserError: a key that there is not, or that all arms share; a value that is not of the key's type; nothing
                to train.
        """
        own, key = self.arms[arm].train, f"arms.{arm}.train"
        if shared := sorted(set(own) & set(_OF_ALL_ARMS)):
            instead = f"arms.{arm}.instruct_data" if shared[0] == "instruct_data" else f"train.{shared[0]}"
            raise UserError(f"{key}.{shared[0]} is the same for all arms: set {instead}")
        config: TrainConfig = _with(self.train, own, key, "train")
        if instructions := self.arms[arm].instruct_data:
            config = replace(config, instruct_data=instructions)
        if not self.has_data(arm):
            config = replace(config, align=replace(config.align, steps=0, epochs=None))
            if not config.runs("instruct"):
                raise UserError(f"arms.{arm}.align: none leaves nothing to train where there is no instruct phase")
        return config if seed is None else replace(config, seed=seed)

    def _settle_text(self, arm: str) -> None:
        """`auto` becomes the column that an arm trains on.

        Raises:
            UserError: it names a caption set that there is not, or asks for new captions of one that has none.
        """
        config, key = self.arms[arm], f"arms.{arm}"
        if config.captions and config.captions not in self.captions:
            known = ", ".join(self.captions) or "none, as the recipe has no section captions"
            raise UserError(f"{key}.captions: there is no caption set '{config.captions}' (there are {known})")
        if not self.has_data(arm):
            return
        name = self.captions_of(arm)
        found = self.captioning(name) is None
        if config.text == AUTO:
            config.text = "caption" if found else "recaption"
        elif found and config.text == "recaption":
            raise UserError(f"{key}.text: {name} holds the captions as found, and no new ones; leave text out")
        if config.mix.by != NONE and config.text == "caption":
            raise UserError(f"{key}.mix: mixes the captions as found with new ones, so text must be recaption")


def _require_name(key: str, name: str, whose: str) -> None:
    if not name.replace("-", "").replace("_", "").isalnum():
        raise UserError(f"{key}: {whose} name becomes a directory; use letters, digits, '-' and '_'")


def _with(section: Any, own: dict[str, Any], key: str, of: str) -> Any:
    """A section (`of` the recipe) with some values of its own, whose types are those of the defaults."""
    known, hints = {each.name for each in fields(section)}, get_type_hints(type(section))
    changes = {}
    for name, value in own.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UserError(f"{key}.{name}: {of} has no such key" + (f"; the nearest is {near[0]}" if near else ""))
        inner = getattr(section, name)
        if is_dataclass(inner):
            if not isinstance(value, dict):
                raise UserError(f"{key}.{name} is a section: its keys stand below it")
            changes[name] = _with(inner, value, f"{key}.{name}", f"{of}.{name}")
        elif not _fits(value, hints[name]):
            raise UserError(f"{key}.{name}: '{value}' is not what {of}.{name} holds ({inner!r} by default)")
        else:
            changes[name] = value
    return replace(section, **changes)


def _fits(value: Any, kind: Any) -> bool:
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    words = [word for each in kinds if get_origin(each) is Literal for word in get_args(each)]
    plain = tuple(get_origin(each) or each for each in kinds if get_origin(each) is not Literal)
    if value in words:
        return True
    if isinstance(value, bool):
        return bool in plain
    return isinstance(value, plain) or (isinstance(value, int) and float in plain)


def expanded(key: str, text: str, run_dir: str) -> str:
    """A text with `run_dir` in place of `${run_dir}`; when `key` is one of PATHS, also without its `~`.

    Raises:
        UserError: it holds another `${...}`.
    """
    for mark in _PLACEHOLDER.findall(text):
        if mark != "${run_dir}":
            raise UserError(f"{key}: '{mark}' stands for nothing; ${{run_dir}} is all that a recipe can refer to")
    text = text.replace("${run_dir}", run_dir)
    return os.path.expanduser(text) if _is_path(key) else text


def paths(recipe: Recipe) -> dict[str, str]:
    """Dotted key -> path, of those keys that hold one."""
    found: dict[str, str] = {}

    def note(key: str, text: str) -> str:
        if text and _is_path(key):
            found[key] = text
        return text

    _change_texts(recipe, note)
    return found


def absolute(recipe: Recipe) -> Recipe:
    """A copy that means the same wherever it is read from; hub ids and addresses in object stores stay as they are."""

    def settle(key: str, text: str) -> str:
        if not text or not _is_path(key) or is_remote(text):
            return text
        hub_id = _starred(key) in _CAPTIONERS and text.count("/") == 1 and not Path(text).exists()
        return text if hub_id else str(Path(text).absolute())

    copy = deepcopy(recipe)
    _change_texts(copy, settle)
    return copy


def _is_path(key: str) -> bool:
    return _starred(key) in PATHS


def _starred(key: str) -> str:
    """A key with `*` in place of the arm, caption set or benchmark that it belongs to."""
    head, _, rest = key.partition(".")
    if key.startswith("evaluate.also."):
        return f"evaluate.also.*.{key.rpartition('.')[2]}"
    return f"{head}.*.{rest.partition('.')[2]}" if head in ("arms", "captions") else key


def _change_texts(section: Any, change: Callable[[str, str], str], prefix: str = "") -> None:
    """Put `change(key, text)` in place of every text in a section and those within."""
    for key in fields(section):
        setattr(section, key.name, _changed(getattr(section, key.name), change, f"{prefix}{key.name}"))


def _changed(value: Any, change: Callable[[str, str], str], key: str) -> Any:
    if isinstance(value, str):
        return change(key, value)
    if isinstance(value, dict):
        return {name: _changed(inner, change, f"{key}.{name}") for name, inner in value.items()}
    if is_dataclass(value):
        _change_texts(value, change, f"{key}.")
    return value


def _shipped(recipe: str | None) -> str | None:
    """A Data-Juicer recipe's path; a bare name that is no file here means one that comes with captune."""
    if recipe is None or Path(recipe).is_file() or not (RECIPES / recipe).is_file():
        return recipe
    return str(RECIPES / recipe)


def recipe_yaml(recipe: Recipe) -> str:
    """The resolved recipe, every default spelled out."""
    import yaml

    return yaml.safe_dump(asdict(recipe), sort_keys=False, allow_unicode=True)
