from __future__ import annotations

import re

import pytest

from pipelines.report import charts, numbers


def test_an_interval_lies_where_its_numbers_are() -> None:
    """Axis from -10 to 20 over 96 % of the width: 0 lies a third along, and the marks at their shares of it."""
    row = charts.Estimate("enhanced", -5.0, 5.0, 15.0, "+5", 1)
    drawing = str(charts.intervals([row], "difference", "{:+g}".format, zero="no difference"))
    ticks = [float(tick) for tick in re.findall(r'class="tick" text-anchor="\w+">([-+]?\d+)<', drawing)]
    low, high = min(ticks), max(ticks)
    assert low <= -5 and high >= 15

    def x(value: float) -> str:
        return f'"{2 + 96 * (value - low) / (high - low):.3f}%"'

    assert f"x1={x(-5)} x2={x(15)}" in drawing and f"<svg x={x(5)}" in drawing
    assert re.search(rf"<line x1={x(0)} x2={x(0)}[^>]*zero", drawing)


def test_bars_keep_proportions_and_escape_names() -> None:
    rows = [charts.Bar("<b>in</b>", 75, "75", 0, lost=25), charts.Bar("out", 50, "50", 1)]
    drawing = str(charts.bars(rows, "rows", maximum=100))
    assert "<b>" not in drawing and "&lt;b&gt;in" in drawing
    assert re.findall(r'width="([\d.]+%)" height="10"', drawing) == ["100%", "75.000%", "25.000%", "100%", "50.000%"]


def _drawn(values: list[float], smooth: bool = False) -> str:
    points = [charts.Point(float(step), value, f"align step {step}") for step, value in enumerate(values, 1)]
    series = [charts.Series("original", 0, [points]), charts.Series("enhanced", 1, [points])]
    return str(charts.curves(series, [("align", 0.0, float(len(values)))], "loss", numbers.figure_text, smooth=smooth))


def test_curves_of_all_arms_share_axes_and_carry_their_values() -> None:
    drawing = _drawn([4.0, 2.0, 1.0])
    assert len(set(re.findall(r'<path d="(M[^"]*)" class="line', drawing))) == 1
    assert (
        "<title>original, align step 2: 2</title>" in drawing and "<title>enhanced, align step 3: 1</title>" in drawing
    )
    assert "a0" in drawing and "a1" in drawing


def test_every_arm_has_signs_of_its_own_on_its_line() -> None:
    """Nine lines of two hundred steps: two signs each, at eight places."""
    points = [charts.Point(step, 1.0 + step, f"step {step}") for step in range(200)]
    series = [charts.Series(f"arm {index}", index, [points]) for index in range(9)]
    svg = str(charts.curves(series, [("align", 0.0, 200.0)], "loss", numbers.figure_text, smooth=False))
    places = re.findall(r'<svg x="([^"]*)" y="[^"]*"[^>]*><path d="[^"]*" class="mark', svg)
    assert len(places) == 18 and len(set(places)) == 16


@pytest.mark.parametrize(("values", "logarithmic"), [([100.0, 1.0], True), ([5.0, 1.0], False), ([100.0, 0.0], False)])
def test_the_axis_is_logarithmic_only_for_wide_positive_ranges(values: list[float], logarithmic: bool) -> None:
    assert ("logarithmic" in _drawn(values)) == logarithmic


def test_a_spike_in_a_long_log_is_not_thinned_away() -> None:
    drawing = _drawn([1.0] * 5000 + [25.0] + [1.0] * 5000)
    line = re.search(r'<path d="(M[^"]*)" class="line', drawing)
    assert line is not None
    heights = [float(point.split()[1]) for point in line[1][1:].split("L")]
    assert len(heights) < 600
    assert min(heights) < min(sorted(set(heights))[1:])


def test_the_moving_average_starts_without_bias() -> None:
    assert charts.moving_average([3.0] * 50) == pytest.approx([3.0] * 50)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0714, "0.0714"), (10.67, "10.7"), (12345.0, "12,300"), (0.00002, "2.00e−5"), (-1.5, "−1.5"), (0.0, "0")],
)
def test_figures_read_well(value: float, text: str) -> None:
    assert numbers.figure_text(value) == text
