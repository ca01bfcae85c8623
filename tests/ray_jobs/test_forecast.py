"""`captune forecast RECIPE`: its rungs are the recipe in small; what cannot be foretold is refused before any work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ray_jobs import cli, forecast, run
from ray_jobs._options import parse

ROOT = Path(__file__).parents[2]
ARMS = "arms: {original: {text: caption}, enhanced: {text: recaption, recipe: refine_captions.yaml}}"
SMALL = ["--sample.pairs", "200", "--sample.instructions", "40", "--sample.questions", "24"]
SHORT = ["--train.align.steps", "16", "--train.instruct.steps", "8", "--train.align.micro_batch", "8"]


@pytest.fixture
def recipe(tmp_path: Path) -> list[str]:
    """The sample's, with two arms: the words that name it, and a run directory."""
    path = tmp_path / "recipe.yaml"
    path.write_text(f"base: sample\n{ARMS}\n")
    return [str(path), "--run_dir", str(tmp_path / "run")]


def test_rungs_have_the_epochs_of_the_whole(recipe: list[str]) -> None:
    """Steps shrink with the rows, in both phases and beside what is an arm's own; epochs of its own rows stay."""
    words = [*recipe, "--arms.enhanced.train", "{align: {steps: 80}, method: dora}"]
    ladder = forecast.Ladder(parse(run.COMMAND, words)[0])
    small = ladder.rungs({"original": 240, "enhanced": 160})
    assert list(small.arms)[:2] == ["original-16", "enhanced-16"]
    kept = {arm: (config.subset.rows, small.training(arm).align.steps) for arm, config in small.arms.items()}
    assert kept["original-16"] == (60, 10) and kept["original-8"] == (120, 20) and kept["original-4"] == (None, 40)
    assert kept["enhanced-16"] == (40, 5) and small.training("enhanced-4").method == "dora"
    assert small.training("original-8").instruct.steps == 8  # of 60
    epochs = forecast.Ladder(parse(run.COMMAND, [*words, "--train.align.epochs", "2"])[0])
    assert epochs.rungs({"original": 240, "enhanced": 160}).training("original-16").align.epochs == 2


def test_what_cannot_be_foretold_is_refused(
    recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["forecast", *recipe, *SMALL, "--sample.pairs", "40"]) == 2
    assert "a 16th are " in capsys.readouterr().err
    assert not (tmp_path / "run" / "forecast" / "captions").exists()
    (tmp_path / "none.yaml").write_text("dataset: x.jsonl\n")
    assert cli.main(["forecast", str(tmp_path / "none.yaml")]) == 2
    assert "needs a recipe with a baseline and another arm" in capsys.readouterr().err
    assert cli.main(["forecast", *recipe, "--forecast.rungs", "[4, 2]"]) == 2
    assert "forecast.rungs: three different parts" in capsys.readouterr().err


@pytest.mark.heavy
@pytest.mark.timeout(1200)
def test_a_recipe_is_tried_in_small(recipe: list[str], tmp_path: Path) -> None:
    """Through the command: six models, what they say of the whole, its hours; and again it is only read."""
    command = [sys.executable, "-m", "ray_jobs.cli", "forecast", *recipe, *SMALL, *SHORT, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert [(point["arm"], point["share"]) for point in found["points"]] == [
        (arm, 1 / part) for part in (16, 8, 4) for arm in ("original", "enhanced")
    ]
    assert found["rows"] == 200 and 30 < found["points"][-2]["rows"] < 70
    assert all(point["loss"] > 0 for point in found["points"])
    low, high = found["arms"]["enhanced"]["gain"]["interval"]
    assert -1 < low < high < 1
    assert found["hours"] and found["spent"] and not list((tmp_path / "run" / "forecast").glob("*/merged"))
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert json.loads(again.stdout)["arms"] == found["arms"] and "steps/s" not in again.stderr
