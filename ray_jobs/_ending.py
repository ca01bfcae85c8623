"""How a command ends: what it made, where, and what comes next, for people; the result as JSON, for programs."""

from __future__ import annotations

import json
import shlex
from types import SimpleNamespace
from typing import Any

from pipelines.progress import say


def end(options: SimpleNamespace, result: Any, made: str, *following: str) -> int:
    """Say what was made and, in the words of a command, what is usually done with it; with `--json` print `result`."""
    say(made)
    if following:
        say(f"next: {shlex.join(following)}")
    if options.json:
        print(json.dumps(result))
    return 0


def tell(options: SimpleNamespace, result: Any, text: str) -> int:
    """Print what a command was asked for: as text, or with `--json` as that."""
    print(json.dumps(result) if options.json else text, flush=True)
    return 0
