"""A recipe: one YAML file with a section per stage, and each section *is* that stage's config dataclass.

It stands here and not in `pipelines` because it joins the sections of both `pipelines` and `serve`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from pipelines.adapters.config import MergeConfig
from pipelines.caption.config import CaptionConfig
from pipelines.errors import UserError
from pipelines.evaluate.config import CompareConfig, EvaluateConfig
from pipelines.refine.config import RefineConfig
from pipelines.sample.config import SampleConfig
from pipelines.train.config import TrainConfig
from serve.config import ServeConfig

RECIPES = Path(__file__).parent.parent / "pipelines" / "recipes"
"""Recipes that come with captune."""


@dataclass
class Recipe:
    """The whole hallway.

    `${run_dir}` in a path stands for `run_dir`, so that a recipe which keeps its data there can be moved by that one
    key.

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
        _expand(self, self.run_dir)
        for config in (self.refine, *self.arms.values()):
            config.recipe = _shipped(config.recipe)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UserError("seeds must be a list of different numbers")
        for arm in self.arms:
            if not arm.replace("-", "").replace("_", "").isalnum():
                raise UserError(f"arms.{arm}: an arm's name becomes a directory; use letters, digits, '-' and '_'")
        if self.arms and self.compare.baseline not in self.arms:
            raise UserError(
                f"compare.baseline names '{self.compare.baseline}', but the arms are {', '.join(self.arms)}"
            )


def _expand(section: Any, run_dir: str) -> None:
    """Put `run_dir` in place of `${run_dir}`, in a section and those within."""
    for key in fields(section):
        value = getattr(section, key.name)
        if isinstance(value, str):
            setattr(section, key.name, value.replace("${run_dir}", run_dir))
        for inner in value.values() if isinstance(value, dict) else [value]:
            if is_dataclass(inner):
                _expand(inner, run_dir)


def _shipped(recipe: str | None) -> str | None:
    """A Data-Juicer recipe's path; a bare name that is no file here means one that comes with captune."""
    if recipe is None or Path(recipe).is_file() or not (RECIPES / recipe).is_file():
        return recipe
    return str(RECIPES / recipe)


def recipe_yaml(recipe: Recipe) -> str:
    """The resolved recipe, every default spelled out."""
    from dataclasses import asdict

    import yaml

    return yaml.safe_dump(asdict(recipe), sort_keys=False, allow_unicode=True)


def recipe_path(name: str) -> Path:
    """A recipe's file: a path as it is, or the name of a recipe that comes with captune."""
    if Path(name).is_file():
        return Path(name)
    shipped = RECIPES / f"{name.removesuffix('.yaml')}.yaml"
    if Path(name).name == name and shipped.is_file():
        return shipped
    known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    raise UserError(f"{name}: no such recipe file (recipes that come with captune: {known})")


def recipe_chain(path: Path) -> list[Path]:
    """A recipe preceded by its `base`, and that one's: the keys of the later win."""
    import yaml

    chain = [path]
    while True:
        try:
            content = yaml.safe_load(chain[0].read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{chain[0]}: not valid YAML ({error})") from error
        base = content.get("base") if isinstance(content, dict) else None
        if base is None:
            return chain
        beside = chain[0].parent / base
        found = beside if beside.is_file() else recipe_path(base)
        if found in chain:
            raise UserError(f"{path}: its `base` leads back to itself")
        chain.insert(0, found)
