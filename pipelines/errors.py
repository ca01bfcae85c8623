"""The two ways a command ends badly; the exit status is part of the command-line contract."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class UserError(ValueError):
    """The user asked for something impossible (exit status 2). The message names the key, file or row and what to
    do.
    """


class WorkFailed(RuntimeError):
    """The work itself, or a check of it, failed (exit status 1). Nothing half-true was written."""


@dataclass(frozen=True)
class Problem:
    """One thing that stands in the way of a command.

    Attributes:
        key: of the recipe, the option or the directory that it belongs to.
        message: what is wrong, and what to do.
    """

    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}"


class NotReady(UserError):
    """Everything that stands in the way of a command, found before it began.

    Args:
        problems: at least one.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        lines = [str(problem) for problem in problems]
        if len(lines) == 1:
            super().__init__(lines[0])
        else:
            super().__init__("\n  ".join([f"{len(lines)} things stand in the way, and nothing was begun:", *lines]))
