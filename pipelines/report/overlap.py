"""The page of `captune overlap`: rows and the benchmark's pictures that they show, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipelines.evaluate.registry import title
from pipelines.report import templates
from pipelines.report.examples import Thumbnails

if TYPE_CHECKING:
    from pipelines.overlap.find import Overlap

LISTED = 500


def page(found: Overlap) -> str:
    """The page; it loads nothing, and the same overlap gives the same text."""
    thumbnails = Thumbnails()
    pairs = [tuple(map(thumbnails.of_bytes, pair)) for pair in found.pictures]
    view = {
        "f": found.facts,
        "title": title(found.facts["benchmark"]),
        "pairs": list(zip(found.facts["rows"], pairs, strict=False)),
        "texts": found.facts["texts"][:LISTED],
    }
    return templates.render("overlap.html.j2", view)


def table(facts: dict[str, Any]) -> str:
    """For a terminal."""
    lines = [
        f"{each['path']}: {each['same_picture']:,} of {each['rows']:,} rows show one of {facts['pictures']:,} pictures "
        f"of {title(facts['benchmark'])}, {each['same_words']:,} hold a question's words"
        + (f"; {each['unreadable']:,} pictures cannot be read" if each["unreadable"] else "")
        for each in facts["datasets"]
    ]
    lines.append(f"{len(facts['contaminated']):,} of {facts['questions']:,} questions are about such a picture")
    return "\n".join(lines)
