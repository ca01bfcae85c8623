"""Numbers as the page shows them. Each carries its full value, so that a reader's script gets what the files hold."""

from __future__ import annotations

import math

from markupsafe import Markup

MINUS, _THIN = "\N{MINUS SIGN}", "\N{NARROW NO-BREAK SPACE}"


def percent(value: float | None) -> Markup:
    """A share: `61.3 %`."""
    return _data(value, percent_text(value or 0.0))


def percent_text(value: float) -> str:
    """The same without markup, for drawings."""
    return f"{100 * value:.1f}{_THIN}%"


def points(value: float | None) -> Markup:
    """A difference of shares: `+12.3`."""
    return _data(value, points_text(value or 0.0))


def points_text(value: float) -> str:
    """The same without markup, for drawings."""
    return f"{100 * value:+.1f}".replace("-", MINUS)


def count(value: int | None) -> Markup:
    """`12,345`."""
    return _data(value, f"{value or 0:,}")


def figure(value: float | None, digits: int = 3) -> Markup:
    """`0.0714`, with so many significant digits."""
    return _data(value, figure_text(value or 0.0, digits))


def figure_text(value: float, digits: int = 3) -> str:
    """The same without markup, for drawings; powers of ten only where zeros would have to be counted."""
    if not math.isfinite(value):
        return str(value)
    if value and not 1e-4 <= abs(value) < 1e5:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e").replace("-", MINUS)
    text = f"{value:.{digits}g}"
    return (f"{float(text):,.0f}" if "e" in text else text).replace("-", MINUS)


def p_value(value: float) -> Markup:
    """`p = 0.03`, or `p < 0.0001`."""
    return _data(value, f"p = {value:.2g}" if value >= 1e-4 else "p < 0.0001")


def clock(seconds: float | None) -> str:
    """`4 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds is None:
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _data(value: float | None, text: str) -> Markup:
    if value is None:
        return Markup('<span class="none">\N{EN DASH}</span>')
    return Markup('<data value="{}">{}</data>').format(repr(value), text)
