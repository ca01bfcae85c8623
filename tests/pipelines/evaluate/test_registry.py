"""A benchmark is one file and a line of the registry: every command and the page know it from there."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pipelines.evaluate.registry import BENCHMARKS
from ray_jobs import cli


@pytest.fixture
def yesno(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("yesno", Path(__file__).with_name("yesno.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(BENCHMARKS, "yesno", module)
    return module


def test_a_new_benchmark_is_one_file(tmp_path: Path, yesno: ModuleType, endpoint: Any, capsys: Any) -> None:
    """Asked, scored, compared and reported, with failures that forbid the page's verdict until they are answered."""
    annotations, images = yesno.write_files(tmp_path, 12)
    places = {arm: tmp_path / arm / "predictions" / "yesno" for arm in ("original", "enhanced")}

    def evaluate(arm: str, says: str, *more: str) -> None:
        endpoint.says = says
        argv = ["evaluate", "--benchmark", "yesno", "--annotations", annotations, "--images", images]
        argv += ["--endpoint", endpoint.url, "--output", places[arm], *more]
        assert cli.main([str(word) for word in argv]) == 0

    def page(status: int) -> str:
        argv = ["compare", *map(str, places.values()), "--output", str(tmp_path), "--json"]
        capsys.readouterr()
        assert cli.main(argv) == status
        assert json.loads(capsys.readouterr().out)["benchmark"] == "yesno"
        assert cli.main(["report", str(tmp_path)]) == 0
        return (tmp_path / "report" / "index.html").read_text()

    endpoint.faults = {f"Is this {number}?": [400] for number in range(12)}
    del endpoint.faults["Is this 3?"]
    evaluate("original", "No.", "--evaluate.max_error_share", "1")
    evaluate("enhanced", "yes it is")
    assert "Yes &amp; No" in (shown := page(1)) and "Yes." not in shown and "Withheld." in shown
    assert "11 requests failed and count as wrong answers" in shown.replace('<data value="11">11</data>', "11")
    assert f"stub at {endpoint.url}/v1" in shown and "only the first word counts" in shown
    evaluate("original", "No.")
    assert "Yes." in (shown := page(0)) and "Withheld." not in shown
    answers = ["score", "--benchmark", "yesno", "--annotations", str(annotations)]
    assert cli.main([*answers, "--predictions", str(places["enhanced"] / "predictions.json")]) == 0
    assert "Yes & No: 100.00 % of 12 questions" in capsys.readouterr().out
