"""The page of `captune analyze`: every stat's distribution, its bounds, and the rows at them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from pipelines.report import templates
from pipelines.report.distributions import Line, histogram
from pipelines.report.examples import Picture, Thumbnails
from pipelines.report.numbers import figure_text, percent_text

if TYPE_CHECKING:
    from pipelines.refine.analysis import Analysis


def page(found: Analysis) -> str:
    """The page; it loads nothing, and the same analysis gives the same text."""
    thumbnails = Thumbnails()
    pictures = {row: _picture(image, thumbnails) for row, image in sorted(found.pictures.items())}
    view = {
        "f": found.facts,
        "pictures": pictures,
        "gone": Picture(problem="not there any more"),
        "drawings": {
            f"{operator['label']}/{stat['name']}": _drawing(operator["label"], stat)
            for operator in found.facts["operators"]
            for stat in operator["stats"]
        },
    }
    return templates.render("analysis.html.j2", view)


def table(facts: dict[str, Any]) -> str:
    """For a terminal: a line for every bound, and one for what has none."""
    head = ("filter", "stat", "1 %", "median", "99 %", "keeps", "alone rejects", "bound", "proposed", "cuts")
    lines = [head]
    for operator in facts["operators"]:
        shares = (percent_text(operator["kept"]), percent_text(operator["alone"]))
        lines += [
            (operator["label"], stat["name"], *_middle(stat), *shares, *_bound(bound))
            for stat in operator["stats"]
            for bound in stat["bounds"] or [None]
        ] or [(operator["label"], "", "", "", "", *shares, "", "", "")]
    shown, before = [], ("", "")
    for line in lines:
        again = line[:2] == before
        before = line[:2]
        shown.append(("", "", "", "", "", "", "", *line[7:]) if again else line)
    widths = [max(len(line[at]) for line in shown) for at in range(len(head))]
    text = [
        f"{facts['looked_at']:,} of {facts['rows']:,} rows looked at: the recipe keeps "
        f"{percent_text(facts['kept'])} of them, the proposed bounds {percent_text(facts['proposed']['kept'])}"
    ]
    if facts["unusable"]:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in facts["unusable"].items())
        text.append(f"no filter saw {sum(facts['unusable'].values()):,} of them: {kinds}")
    text += ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in shown]
    if facts["not_measured"]:
        text.append(f"not measured, because they look at all rows: {', '.join(facts['not_measured'])}")
    return "\n".join(text)


def _middle(stat: dict[str, Any]) -> tuple[str, ...]:
    return tuple(figure_text(stat["percentiles"][each]) for each in ("1", "50", "99"))


def _bound(bound: dict[str, Any] | None) -> tuple[str, str, str]:
    if bound is None:
        return ("", "", "")
    value = "none" if bound["value"] is None else f"{bound['value']:,.10g}"
    change = f"{percent_text(bound['cuts'])} to {percent_text(bound['proposed_cuts'])}"
    return (f"{bound['parameter']} {value}", str(bound["proposed"]), change)


def _drawing(label: str, stat: dict[str, Any]) -> Markup:
    lines = [
        Line(float(value), f"{bound['parameter']} {words}: {value}", kind)
        for bound in stat["bounds"]
        for kind, words, value in (("bound", "now", bound["value"]), ("proposed", "proposed", bound["proposed"]))
        if value is not None
    ]
    shape = stat["histogram"]
    return histogram(shape["edges"], shape["counts"], lines, f"{stat['name']} of {label}", figure_text)


def _picture(image: bytes | str, thumbnails: Thumbnails) -> Picture:
    return thumbnails.of_bytes(image) if isinstance(image, bytes) else thumbnails.of_file(image)
