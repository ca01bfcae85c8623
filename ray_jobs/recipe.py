"""A recipe: one YAML file with a section per stage, and each section *is* that stage's config dataclass.

It stands here and not in `pipelines` because it joins the sections of both `pipelines` and `serve`; `recipe_file` reads
its files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from pipelines.adapters.config import MergeConfig
from pipelines.caption.config import CaptionConfig
from pipelines.errors import UserError
from pipelines.evaluate.config import CompareConfig, EvaluateConfig
from pipelines.refine.config import RefineConfig
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
    "caption.model",
    "caption.candidates.clip_model",
    "refine.recipe",
    "arms.*.recipe",
    "train.model",
    "train.instruct_data",
    "evaluate.annotations",
    "evaluate.images",
    "evaluate.ocr",
)
"""Keys that hold a path; `*` stands for every arm. A model may also be a hub id, a dataset an address or a pattern."""
_PLACEHOLDER = re.compile(r"\$\{[^}]*\}?")


@dataclass
class Recipe:
    """The whole hallway.

    `${run_dir}` in a path stands for `run_dir`, so that a recipe which keeps its data there can be moved by that one
    key; `~` at the beginning of a path is the home directory.

    Attributes:
        run_dir: where the run writes; it explains itself (see the README).
        dataset: image-text pairs in any format captune reads.
        seeds: training is repeated per seed, and the comparison is made per seed.
        sample: the embedded sample world.
        caption: recaptioning with BLIP-2.
        refine: choice of text and filters when `captune refine` is called by itself.
        arms: name -> choice of text and filters; data is all that arms may differ in.
        train: alignment and LoRA.
        merge: adapter into model.
        serve: the HTTP endpoint.
        evaluate: the benchmark.
        compare: intervals and tests.
    """

    run_dir: str = "runs/run"
    dataset: str = ""
    seeds: list[int] = field(default_factory=lambda: [0])
    sample: SampleConfig = field(default_factory=SampleConfig)
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    refine: RefineConfig = field(default_factory=RefineConfig)
    arms: dict[str, RefineConfig] = field(default_factory=dict)
    train: TrainConfig = field(default_factory=TrainConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)

    def __post_init__(self) -> None:
        if "${" in self.run_dir:
            raise UserError(f"run_dir: '{self.run_dir}' cannot refer to anything")
        self.run_dir = os.path.expanduser(self.run_dir)
        _change_texts(self, lambda key, text: expanded(key, text, self.run_dir))
        for config in (self.refine, *self.arms.values()):
            config.recipe = _shipped(config.recipe)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UserError("seeds must be a list of different numbers")
        for arm in self.arms:
            if not arm.replace("-", "").replace("_", "").isalnum():
                raise UserError(f"arms.{arm}: an arm's name becomes a directory; use letters, digits, '-' and '_'")
        if self.arms:
            self.compare.baseline_among(self.arms)


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
        hub_id = key.endswith("model") and text.count("/") == 1 and not Path(text).exists()
        return text if hub_id else str(Path(text).absolute())

    copy = deepcopy(recipe)
    _change_texts(copy, settle)
    return copy


def _is_path(key: str) -> bool:
    head, _, rest = key.partition(".")
    return (f"arms.*.{rest.partition('.')[2]}" if head == "arms" else key) in PATHS


def _change_texts(section: Any, change: Callable[[str, str], str], prefix: str = "") -> None:
    """Put `change(key, text)` in place of every text in a section and those within."""
    for key in fields(section):
        name, value = f"{prefix}{key.name}", getattr(section, key.name)
        if isinstance(value, str):
            setattr(section, key.name, change(name, value))
        elif is_dataclass(value):
            _change_texts(value, change, f"{name}.")
        elif isinstance(value, dict):
            for inner, config in value.items():
                _change_texts(config, change, f"{name}.{inner}.")


def _shipped(recipe: str | None) -> str | None:
    """A Data-Juicer recipe's path; a bare name that is no file here means one that comes with captune."""
    if recipe is None or Path(recipe).is_file() or not (RECIPES / recipe).is_file():
        return recipe
    return str(RECIPES / recipe)


def recipe_yaml(recipe: Recipe) -> str:
    """The resolved recipe, every default spelled out."""
    import yaml

    return yaml.safe_dump(asdict(recipe), sort_keys=False, allow_unicode=True)
