"""The two ways a command ends badly; the exit status is part of the command-line contract."""

from __future__ import annotations


class UserError(ValueError):
    """The user asked for something impossible (exit status 2). The message names the key, file or row and what to
    do.
    """


class WorkFailed(RuntimeError):
    """The work itself, or a check of it, failed (exit status 1). Nothing half-true was written."""
