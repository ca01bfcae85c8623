"""Bounds of a recipe's filters: which parameter bounds which stat from which side, and other values for them.

Data-Juicer says nowhere which stat a parameter bounds. Names tell (`min_ratio`, `max_width`), and data decide: what
names tell is believed where it explains the filter's decision on every row.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from pipelines.refine.apply import Outcome
from pipelines.refine.config import AnalyzeConfig
from pipelines.refine.operators import Operator

if TYPE_CHECKING:
    import numpy as np

_UNITS = {"kb": 10, "kib": 10, "mb": 20, "mib": 20, "gb": 30, "gib": 30, "tb": 40, "tib": 40}
_MEETS = 0.002
"""Half of the largest difference of shares at which the search for `keep` ends."""


@dataclass(frozen=True)
class Bound:
    """One end of what a filter keeps.

    Attributes:
        operator: its label.
        parameter: e.g. `min_num`.
        stat: what it bounds, e.g. `num_words`.
        low: it is the lower end.
        value: as the recipe has it; infinite where the filter's default bounds nothing.
        whole: only whole numbers make sense.
        text: the parameter is written as text (`1KB`).
    """

    operator: str
    parameter: str
    stat: str
    low: bool
    value: float
    whole: bool = False
    text: bool = False

    def keeps(self, values_F: np.ndarray) -> np.ndarray:
        """bool [F]: rows on the right side; the bound itself is."""
        kept: np.ndarray = values_F >= self.value if self.low else values_F <= self.value
        return kept

    def at(self, value: float) -> Bound:
        """The same bound elsewhere, rounded away from the rows that it keeps where only whole numbers make sense."""
        if self.whole and math.isfinite(value):
            value = math.floor(value) if self.low else math.ceil(value)
        return Bound(self.operator, self.parameter, self.stat, self.low, float(value), self.whole, self.text)

    def written(self) -> Any:
        """Its value as a recipe has it: enough digits that it cuts where it says."""
        number: Any = int(self.value) if self.whole else float(f"{self.value:.6g}")
        return str(number) if self.text else number


def single(value: Any) -> float | None:
    """A stat as a number: of a list of one (a stat per image) its element; None where it is no number."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def bounds_of(operator: Operator, parameters: dict[str, Any], outcomes: Sequence[Outcome]) -> list[Bound]:
    """The bounds of one filter, as its recipe gives them, or all that it has where the recipe gives none.

    Args:
        outcomes: what the filter said of some rows.

    Returns:
        None where a bound cannot be told, or the bounds found do not explain what the filter did.
    """
    judged = [outcome for outcome in outcomes if not outcome.failed and outcome.stats]
    stats = [name for name in (judged[0].stats if judged else ()) if single(judged[0].stats[name]) is not None]
    if operator.kind != "filter" or not stats:
        return []
    found = [
        bound
        for name, known in inspect.signature(type(operator.op).__init__).parameters.items()
        if name.startswith(("min_", "max_"))
        and (bound := _bound(operator.label, known, parameters.get(name, known.default), stats))
    ]
    explained = all(
        (outcome.step is None)
        == all(
            (value := single(outcome.stats.get(bound.stat))) is not None
            and (value >= bound.value if bound.low else value <= bound.value)
            for bound in found
        )
        for outcome in judged
    )
    if not explained:
        return []
    given = [bound for bound in found if bound.parameter in parameters]
    return given or [bound for bound in found if math.isfinite(bound.value)]


def _bound(label: str, parameter: inspect.Parameter, value: Any, stats: list[str]) -> Bound | None:
    side, _, what = parameter.name.partition("_")
    near = stats if len(stats) == 1 else [stat for stat in stats if stat.endswith(what)]
    number = _bytes(value) if (text := isinstance(value, str)) else value
    if len(near) != 1 or isinstance(number, bool) or not isinstance(number, (int, float)):
        return None
    whole = text or int in (parameter.annotation, *get_args(parameter.annotation))
    return Bound(label, parameter.name, near[0], side == "min", float(number), whole, text)


def _bytes(text: str) -> int | None:
    """`1KB` as Data-Juicer reads it."""
    unit = "".join(filter(str.isalpha, text)).lower()
    digits = "".join(filter(str.isdigit, text))
    return int(digits) << (_UNITS[unit] if unit else 0) if digits and (not unit or unit in _UNITS) else None


def propose(
    bounds: Sequence[Bound],
    values: dict[tuple[str, str], np.ndarray],
    others_F: np.ndarray,
    config: AnalyzeConfig,
    rows: int,
) -> list[Bound]:
    """The same bounds where `config` wants them.

    Args:
        values: (operator, stat) -> float [F], NaN where a row has none.
        others_F: bool [F], rows that everything else of the recipe keeps.
        rows: of which `config.keep` is a share: those F, and those that no filter sees.
    """
    import numpy as np

    def column(bound: Bound) -> np.ndarray:
        every = values[bound.operator, bound.stat]
        return every[np.isfinite(every)]

    def by_quantile(share: float) -> list[Bound]:
        return [_settled(bound, _quantile(column(bound), share if bound.low else 1 - share)) for bound in bounds]

    if config.by == "quantile":
        return by_quantile(config.quantile)
    if config.by == "sigma":
        ends = [(column(bound), -config.sigma if bound.low else config.sigma) for bound in bounds]
        spread = [float(found.mean() + factor * found.std()) for found, factor in ends]
        return [_settled(bound, end) for bound, end in zip(bounds, spread, strict=True)]
    assert config.keep is not None
    wanted = config.keep
    return by_quantile(_search(lambda share: float(kept(by_quantile(share), values, others_F).sum()) / rows - wanted))


def kept(bounds: Sequence[Bound], values: dict[tuple[str, str], np.ndarray], others_F: np.ndarray) -> np.ndarray:
    """bool [F]: rows that all bounds keep, and everything else. A row without the stat is beyond the bound."""
    left_F = others_F.copy()
    for bound in bounds:
        left_F &= bound.keeps(values[bound.operator, bound.stat])
    return left_F


def _quantile(values_F: np.ndarray, share: float) -> float:
    """A value that some row has: what lies between two is beyond none."""
    import numpy as np

    return float(np.quantile(values_F, share, method="inverted_cdf")) if len(values_F) else math.nan


def _settled(bound: Bound, value: float) -> Bound:
    """The bound at a value; where it was if no row has the stat. Its written form never cuts what it stands for."""
    if math.isnan(value):
        return bound
    made = bound.at(value)
    if made.whole:
        return made
    written = made.written()
    beyond = written > value if bound.low else written < value
    step = 10.0 ** (math.floor(math.log10(abs(value))) - 5) if beyond and value else 0.0
    return made.at(float(f"{written - step if bound.low else written + step:.6g}"))


def _search(excess: Callable[[float], float]) -> float:
    """The quantile at which `excess`, which falls with it, comes nearest to zero and is not below it."""
    low, high = 0.0, 0.5
    if excess(low) <= 0:
        return low
    while high - low > _MEETS / 4:
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) >= 0 else (low, middle)
    return low
