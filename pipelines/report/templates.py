"""The pages' templates: everything from data is escaped, a missing value is an error, numbers have their filters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.report import numbers


def render(name: str, view: dict[str, Any]) -> str:
    """A template of this folder with the values of `view`; the same values give the same text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for each in ("percent", "points", "count", "figure", "p_value", "clock"):
        environment.filters[each] = getattr(numbers, each)
    return environment.get_template(name).render(view)
