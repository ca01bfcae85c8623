"""The `refine` section of a recipe; every arm of a comparison is one of these, because data is all that arms may differ
in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from pipelines.demand import Demand
from pipelines.errors import UserError

WAYS = ("none", "random", "score", "both")


@dataclass
class MixConfig:
    """Captions as found beside new ones, as DataComp's recaptioning found best (Nguyen et al. 2023, arXiv:2307.10350).

    Attributes:
        by: which text a sample trains on: `none`: the one that `text` names; `random`: chance says, for each sample;
            `score`: the one that the filters keep, and of two kept ones the one of the higher `score`; `both`: both
            are rows, and the filters judge each by itself.
        share: of the samples that train on their new caption: with `random` the chance; with `score` those by which the
            new caption gains most, and empty all by which it gains at all.
        score: a stat that an operator of `recipe` computes, e.g. `image_text_similarity`; more is better, with `-`
            before its name less.
        seed: of chance.
    """

    by: str = "none"
    share: float | None = None
    score: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.by not in WAYS:
            raise UserError(f"refine.mix.by must be one of {', '.join(WAYS)}, not '{self.by}'")
        if self.share is not None and not 0 <= self.share <= 1:
            raise UserError(f"refine.mix.share is a share between 0 and 1, not {self.share:g}")
        if self.by == "random" and self.share is None:
            raise UserError("refine.mix.share is not set: which share of the samples trains on its new caption?")
        if self.by == "score" and not self.score:
            raise UserError("refine.mix.score is not set: which of the recipe's stats chooses the caption?")
        if self.share is not None and self.by in ("none", "both"):
            raise UserError(f"refine.mix.share is of no use with by: {self.by}")
        if self.score and self.by != "score":
            raise UserError(f"refine.mix.score is of no use with by: {self.by}")


@dataclass
class SubsetConfig:
    """Fewer rows than the filters keep: a part that is drawn by chance.

    Attributes:
        rows: so many; empty: all. A smaller subset of the same seed is part of a larger one.
        seed: of chance. Arms that keep the same sample draw it alike.
    """

    rows: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows is not None and self.rows < 1:
            raise UserError(f"refine.subset.rows must be at least 1, not {self.rows}")


@dataclass
class RefineConfig:
    """Which text trains the model and which rows are kept.

    Attributes:
        text: the record column that becomes the training text: `caption` (as found) or `recaption`.
        recipe: a Data-Juicer recipe (YAML); its operators decide what is kept. None keeps every row that has an image
            and a text.
        without: what `captune overlap` wrote: rows that show a benchmark's picture are rejected.
        mix: captions as found beside new ones.
        subset: fewer rows than are kept.
        batch_size: rows per call of an operator.
        cpus_per_task: CPUs that Ray reserves for one operator task.
    """

    texts: ClassVar[tuple[str, ...]] = ("caption", "recaption")
    text: str = "recaption"
    recipe: str | None = None
    without: str | None = None
    mix: MixConfig = field(default_factory=MixConfig)
    subset: SubsetConfig = field(default_factory=SubsetConfig)
    batch_size: int = 256
    cpus_per_task: float = 1.0

    def __post_init__(self) -> None:
        if self.text not in self.texts:
            raise UserError(f"refine.text must be {' or '.join(self.texts)}, not '{self.text}'")
        if self.mix.by == "score" and not self.recipe:
            raise UserError("refine.mix.score: there is no recipe whose operators compute it")
        if self.batch_size < 1:
            raise UserError(f"refine.batch_size must be at least 1, not {self.batch_size}")
        if self.cpus_per_task <= 0:
            raise UserError(f"refine.cpus_per_task must be positive, not {self.cpus_per_task}")

    def demand(self, section: str = "refine") -> Demand:
        """One operator task; more run where there is room. An arm's `section` is `arms.NAME`."""
        return Demand(section, "task", 1, self.cpus_per_task, keys=("", "cpus_per_task", ""))


BOUNDS = ("keep", "quantile", "sigma")


@dataclass
class AnalyzeConfig:
    """Which bounds `captune analyze` proposes for a Data-Juicer recipe's filters, and from how many rows.

    Attributes:
        rows: rows that are looked at, drawn by chance; 0: all.
        by: `quantile`: every bound leaves that share of the rows beyond it; `sigma`: so many standard deviations from
            the mean; `keep`: one quantile for all bounds, chosen so that together they keep the share `keep`.
        keep: share of the rows that all filters together leave.
        quantile: share of the rows that a bound by itself cuts off.
        sigma: standard deviations.
        seed: of the drawing.
    """

    rows: int = 5000
    by: str = "quantile"
    keep: float | None = None
    quantile: float = 0.01
    sigma: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.keep is not None and not 0 < self.keep <= 1:
            raise UserError(f"analyze.keep is a share above 0 and up to 1, not {self.keep:g}")
        if self.keep is not None:
            self.by = "keep"
        if self.by not in BOUNDS:
            raise UserError(f"analyze.by must be one of {', '.join(BOUNDS)}, not '{self.by}'")
        if self.by == "keep" and self.keep is None:
            raise UserError("analyze.keep is not set: which share of the rows shall be left?")
        if not 0 <= self.quantile < 0.5:
            raise UserError(f"analyze.quantile is a share from 0 to below 0.5, not {self.quantile:g}")
        if self.sigma <= 0:
            raise UserError(f"analyze.sigma must be positive, not {self.sigma:g}")
        if self.rows < 0:
            raise UserError(f"analyze.rows is a number of rows, or 0 for all, not {self.rows}")
