"""When a captioning run must stop: before a model loads, and while it runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from pipelines.caption.window import Window
from pipelines.errors import UserError, WorkFailed


@dataclass
class GuardConfig:
    """When to stop, resumably, since a broken model should not spend a night on a million captions.

    Both limits look at the last `window` rows, once there are `min_rows` of them; 1 switches a limit off.

    Attributes:
        max_error_share: largest share of rows that may fail.
        max_repetition: largest mean share of two-word sequences that a caption says more than once (Data-Juicer's
            word_rep_ratio at 2 words).
        min_rows: no judgement on fewer rows.
        window: rows looked back at.
    """

    max_error_share: float = 0.5
    max_repetition: float = 0.7
    min_rows: int = 500
    window: int = 1000

    def __post_init__(self) -> None:
        name = "caption.guards"
        for key in ("max_error_share", "max_repetition"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"{name}.{key} is a share between 0 and 1, not {getattr(self, key):g}")
        if not 1 <= self.min_rows <= self.window:
            raise UserError(f"{name}.min_rows: {self.min_rows} is not between 1 and window, {self.window}")


def judge(recent: Window, guards: GuardConfig, failed: Counter[str], last_error: str) -> str:
    """Why a run has to stop; empty while it may go on.

    Args:
        recent: its last rows.
        failed: rows of the whole run that failed, by kind.
        last_error: of the row that failed last.
    """
    if recent.rows < guards.min_rows:
        return ""
    if recent.error_share > guards.max_error_share:
        return _too_many_errors(recent.error_share, recent.rows, guards, failed, last_error)
    if recent.repetition > guards.max_repetition:
        return (
            f"the last {recent.rows} captions repeat themselves: {recent.repetition:.2f} of their two-word sequences, "
            f"and caption.guards.max_repetition is {guards.max_repetition:g}; e.g. '{recent.most_repetitive()[:120]}'"
        )
    return ""


def refuse_useless(rows: int, failed: Counter[str], example: str, guards: GuardConfig) -> None:
    """Stop before any model loads when so many rows have no picture that the dataset must be in the wrong place: more
    than the guard allows, or all.

    Args:
        rows: of the dataset.
        failed: those that cannot be used, by kind.
        example: one of their errors.

    Raises:
        WorkFailed: the share of failed rows passes `guards.max_error_share`, or is 1.
    """
    count = failed.total()
    if rows >= guards.min_rows and count > guards.max_error_share * rows:
        reason = _too_many_errors(count / rows, rows, guards, failed, example)
        raise WorkFailed(f"{reason}. Nothing was captioned; put it right and run the same command again")
    if rows and count == rows:
        raise WorkFailed(all_failed(failed, example))


def all_failed(kinds: Counter[str], example: str) -> str:
    """What to say when not one row is left, however few there were."""
    each = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return f"not one row could be used: {each}; e.g. {example[:200]}. Put it right and run the same command again"


def _too_many_errors(share: float, rows: int, guards: GuardConfig, kinds: Counter[str], example: str) -> str:
    """The guard's sentence."""
    kind = kinds.most_common(1)[0][0]
    return (
        f"{100 * share:.0f} % of the last {rows} rows failed, most by '{kind}', and caption.guards.max_error_share is "
        f"{guards.max_error_share:g}; e.g. {example[:200]}"
    )
