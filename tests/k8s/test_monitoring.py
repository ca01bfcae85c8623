"""Dashboards and alerts: well-formed, and every metric that they name is one that a cluster exports."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import ray.dashboard
import yaml

from k8s import render
from pipelines.train.gauges import GAUGES

ROOT = Path(__file__).parents[2]
FOLDER = render.FOLDER / "components" / "monitoring"
DASHBOARDS = sorted(FOLDER.glob("dashboards/*.json"))
RULES = [
    rule for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text())["spec"]["groups"] for rule in group["rules"]
]
CAPTION = {
    f"ray_captune_caption_{name}"
    for name in (
        "images_total",
        "failed_total",
        "images_per_second",
        "error_share",
        "mean_words",
        "lexical_diversity",
        "repetition",
        "remaining_images",
    )
}
"""What the captioning stage exports."""


BY_PROMETHEUS = {"ray_io_cluster", "group", "instance"}
"""Labels that the PodMonitors and Prometheus itself add."""


@cache
def recorded() -> dict[str, set[str]]:
    """Metric -> labels, from a real cluster (record_metrics.py)."""
    lines = Path(__file__).with_name("exported_metrics.txt").read_text().splitlines()[1:]
    return {name: set(labels.split(",")) - {""} for name, _, labels in (line.partition(" ") for line in lines)}


@cache
def exported() -> frozenset[str]:
    """Names that a cluster exports: recorded from a real one, and those that it exports only with cards or after an
    error.
    """
    # Ray's own dashboards and its reporter name what needs a GPU, an autoscaler or a failed request to appear.
    modules = Path(ray.dashboard.__file__).parent / "modules"
    panels = "".join(path.read_text() for path in (modules / "metrics" / "dashboards").glob("*_panels.py"))
    gauges = re.findall(
        r'^    "([a-z_]+)": Gauge\(', (modules / "reporter" / "reporter_agent.py").read_text(), re.MULTILINE
    )
    return (
        frozenset(recorded()) | set(re.findall(r"ray_[a-z_]+", panels)) | {f"ray_{name}" for name in gauges} | CAPTION
    )


def parsed(expression: str) -> Any:
    """PromQL by a real parser, with Grafana's variables filled in; a malformed one is a ValueError."""
    for variable, value in {"$__rate_interval": "5m", "$cluster": "x", "$run": "x"}.items():
        expression = expression.replace(variable, value)
    return promql_parser.parse(expression)


def names(expression: str) -> set[str]:
    """The metrics in an expression."""
    return {node.name for node in walk(parsed(expression)) if isinstance(node, promql_parser.VectorSelector)}


def strange_labels(expression: str) -> set[str]:
    """Labels that an expression matches or groups by, and no recorded metric in it carries. A metric that was not
    recorded may have any.
    """
    nodes = list(walk(parsed(expression)))
    selectors = [node for node in nodes if isinstance(node, promql_parser.VectorSelector)]
    if any(node.name not in recorded() for node in selectors):
        return set()
    strange = {
        f"{node.name}{{{matcher.name}}}"
        for node in selectors
        for matcher in node.matchers.matchers
        if matcher.name not in recorded()[node.name] | BY_PROMETHEUS
    }
    there = set().union(BY_PROMETHEUS, {"le"}, *(recorded()[node.name] for node in selectors))
    for node in nodes:
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            strange |= set(node.modifier.labels) - there
    return strange


def walk(node: Any) -> Iterator[Any]:
    """Every part of a parsed expression."""
    yield node
    for field in ("expr", "lhs", "rhs", "vector_selector"):
        if getattr(node, field, None) is not None:
            yield from walk(getattr(node, field))
    for argument in getattr(node, "args", None) or []:
        yield from walk(argument)


def expressions() -> list[tuple[str, str]]:
    found = [(f"alert {rule['alert']}", rule["expr"]) for rule in RULES]
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            found += [(f"{path.stem}: {panel['title']}", target["expr"]) for target in panel["targets"]]
    return found


def test_every_panel_and_alert_names_metrics_that_exist() -> None:
    missing = {where: sorted(names(expression) - exported()) for where, expression in expressions()}
    assert {where: unknown for where, unknown in missing.items() if unknown} == {}
    assert all(names(expression) for _, expression in expressions()), "an expression without a metric shows nothing"
    assert not {"ray_captune_train_los", "ray_node_gpu_utilisation"} & exported()


def test_every_panel_and_alert_asks_for_labels_that_exist() -> None:
    assert {
        where: strange_labels(expression) for where, expression in expressions() if strange_labels(expression)
    } == {}
    assert strange_labels('sum by (colour) (ray_tasks{Stat="x"})') == {"colour", "ray_tasks{Stat}"}


def test_a_malformed_expression_is_noticed() -> None:
    with pytest.raises(ValueError, match="."):
        names("sum(rate(ray_tasks[5m])")


def test_what_training_exports_was_recorded_and_is_shown() -> None:
    gauges = {f"ray_{name}" for name, _ in GAUGES.values()}
    assert gauges <= set(recorded())
    assert gauges <= {name for _, expression in expressions() for name in names(expression)}


def test_what_captioning_exports_is_what_its_source_says_and_is_shown() -> None:
    source = "".join(path.read_text() for path in (ROOT / "pipelines" / "caption").glob("*.py"))
    said = {f"ray_{name}" for name in re.findall(r"captune_caption_[a-z_]+", source)}
    assert said == CAPTION != set()
    assert said <= {name for _, expression in expressions() for name in names(expression)}


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_one(path: Path) -> None:
    """Grafana takes it, no two panels share an id or a place, and every one asks the data source that is chosen
    above.
    """
    dashboard = json.loads(path.read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert dashboard["uid"] == f"captune-{path.stem}"
    squares = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(squares)) == len(squares)
    assert max(x for x, _ in squares) < 24
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    text = path.read_text()
    assert set(re.findall(r"\$\{?([a-z]+)\}?", text)) <= variables
    for panel in panels:
        assert panel["datasource"]["uid"] == "${datasource}"
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_all_dashboards_and_no_others_are_shipped() -> None:
    generator = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["configMapGenerator"][0]
    assert sorted(generator["files"]) == [f"dashboards/{path.name}" for path in DASHBOARDS]


def test_an_alert_says_how_bad_it_is_and_what_to_do() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert len(rule["annotations"]["summary"]) > 20
        assert len(rule["annotations"]["runbook"]) > 40
