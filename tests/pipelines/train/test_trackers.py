"""A real MLflow on a directory: every step once, whatever happened on the way."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipelines import preflight
from pipelines.errors import UserError
from pipelines.train.config import TrainConfig
from pipelines.train.log import TrainLog
from pipelines.train.trackers import TRACKER, Tracker, environment

client = pytest.importorskip("mlflow.tracking").MlflowClient


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where MLflow keeps its runs; relative, as people say it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return tmp_path / "mlruns"


def _line(phase: str, step: int) -> dict[str, Any]:
    line = {"phase": phase, "step": step, "loss": 1.0 / step, "grad_norm": 2.0, "clipped": True, "learning_rate": 1e-3}
    return line | {"samples_per_second": 3.0} | ({"held_out_loss": 0.5} if step == 2 else {})


def _tracker(place: Path, **settings: Any) -> Tracker:
    return Tracker("mlflow", place, "demo/enhanced", {"train": {"seed": 3, **settings}}, environment())


def test_a_resumed_run_goes_on_where_it_was_and_says_nothing_twice(store: Path, tmp_path: Path) -> None:
    place = tmp_path / "adapter"
    place.mkdir()
    log = TrainLog(place, {}, _tracker(place))
    for step in (1, 2, 3):
        log.write(_line("align", step))
    # Killed here, with a checkpoint of step 1 and another number of workers: steps 2 and 3 are done again.
    with TrainLog(place, {"align": 1}, _tracker(place, workers=2)) as again:
        for phase, step in (("align", 2), ("align", 3), ("align", 4), ("instruct", 1)):
            again.write(_line(phase, step))
        again.stability("align")
    service = client(store.as_uri())
    (experiment,) = [found for found in service.search_experiments() if found.name == "captune"]
    (run,) = service.search_runs([experiment.experiment_id])
    assert run.info.run_name == "demo/enhanced" and run.info.status == "FINISHED"
    assert run.data.params == {"train.seed": "3"}
    assert run.data.tags["captune.output"] == str(place)
    assert run.data.tags["align.stability"] == "too short to tell"

    def steps(key: str) -> list[tuple[int, float]]:
        return [(metric.step, metric.value) for metric in service.get_metric_history(run.info.run_id, key)]

    assert steps("align/loss") == [(step, 1.0 / step) for step in (1, 2, 3, 4)]
    assert steps("align/held_out_loss") == [(2, 0.5)]
    assert steps("align/clipped") == [(step, 1.0) for step in (1, 2, 3, 4)]
    assert steps("instruct/loss") == [(1, 1.0)]


def test_what_an_outage_kept_back_is_sent_later(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training does not end with the tracker; the log has everything meanwhile."""
    place = tmp_path / "adapter"
    place.mkdir()
    tracker = _tracker(place)
    log = TrainLog(place, {}, tracker)
    log.write(_line("align", 1))
    shutil.move(store, tmp_path / "gone")
    log.write(_line("align", 2))
    log.write(_line("align", 3))
    assert capsys.readouterr().err.count("does not answer") == 1  # and is not asked again at once
    shutil.move(tmp_path / "gone", store)
    tracker.again = 0.0  # five minutes later
    log.write(_line("align", 4))
    log.close()
    history = client(store.as_uri()).get_metric_history(tracker.service.run, "align/loss")
    assert [metric.step for metric in history] == [1, 2, 3, 4]


def test_a_tracker_that_cannot_work_is_refused_before_the_first_step(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No package, no address, nobody there."""

    def said(tracker: str) -> list[str]:
        problems = preflight.train(TrainConfig(tracker=tracker), "")
        return [problem.message for problem in problems if problem.key == "train.tracker"]

    assert said("mlflow") == []
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert "MLFLOW_TRACKING_URI" in said("mlflow")[0]
    if importlib.util.find_spec("wandb") is None:
        assert said("wandb") == ["wandb is not installed; pip install 'captune[trackers]' brings it"]
    with pytest.raises(UserError, match=r"train.tracker must be none, mlflow or wandb, not 'csv'"):
        TrainConfig(tracker="csv")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"train.tracker: mlflow refuses: .*127\.0\.0\.1"):
        _tracker(tmp_path)
    assert not (tmp_path / TRACKER).exists()
