"""The `refine` section of a recipe; every arm of a comparison is one of these, because data is all that arms may differ
in.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.demand import Demand
from pipelines.errors import UserError


@dataclass
class RefineConfig:
    """Which text trains the model and which rows are kept.

    Attributes:
        text: the record column that becomes the training text: `caption` (as found) or `recaption`.
        recipe: a Data-Juicer recipe (YAML); its operators decide what is kept. None keeps every row that has an image
            and a text.
        batch_size: rows per call of an operator.
        cpus_per_task: CPUs that Ray reserves for one operator task.
    """

    text: str = "recaption"
    recipe: str | None = None
    batch_size: int = 256
    cpus_per_task: float = 1.0

    def __post_init__(self) -> None:
        if self.text not in ("caption", "recaption"):
            raise UserError(f"refine.text must be caption or recaption, not '{self.text}'")
        if self.batch_size < 1:
            raise UserError(f"refine.batch_size must be at least 1, not {self.batch_size}")
        if self.cpus_per_task <= 0:
            raise UserError(f"refine.cpus_per_task must be positive, not {self.cpus_per_task}")

    def demand(self, section: str = "refine") -> Demand:
        """One operator task; more run where there is room. An arm's `section` is `arms.NAME`."""
        return Demand(section, "task", 1, self.cpus_per_task, keys=("", "cpus_per_task", ""))
