"""`captune explain RUN` names the causes of a gain in the order of what they did, and trains no more than it must."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_jobs import cli
from tests.pipelines.report.synthetic_run import FILTERED, FIVE, PROCESS, build
from tests.ray_jobs import planted

ARMS_OF_CORNERS = ("original", "recaptioned", "original", "enhanced")
ROOT = Path(__file__).parents[2]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "ray_jobs.cli", *words]


def captune(*words: str) -> str:
    done = subprocess.run(command(*words), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def killed_when(sign: Path, *words: str) -> None:
    """`kill -9` as soon as a file is there."""
    process = subprocess.Popen(command(*words), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not sign.is_file():
            assert process.poll() is None, f"it ended before {sign} was there"
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_planted_defects_are_named_in_their_order(tmp_path: Path) -> None:
    """Captions that loop, are of other pictures, or are one phrase, in known shares: each cause gets the more the more
    pairs it puts right, one that touches no row nothing at all, and the parts are the gain. Killed, it goes on.
    """
    recipe = planted.write(tmp_path, pairs=200, instructions=100, questions=200)
    captune("run", str(recipe))
    run, found = str(tmp_path / "run"), tmp_path / "run" / "explain" / "enhanced"
    foreseen = json.loads(captune("explain", run, "--dry-run", "--json"))
    assert foreseen["at_most"] and not found.exists()
    killed_when(found / "causes-3" / "predictions" / "textvqa" / "MANIFEST.json", "explain", run)
    first = (found / "causes-3" / "adapter" / "MANIFEST.json").read_text()
    explanation = json.loads(captune("explain", run, "--json"))
    assert (found / "causes-3" / "adapter" / "MANIFEST.json").read_text() == first
    assert explanation == json.loads((found / "explanation.json").read_text())

    parts = {entry["name"]: entry["part"] for entry in explanation["causes"]}
    assert sorted(parts, key=lambda name: -parts[name]) == sorted(parts, key=lambda name: -planted.CURED[name])
    assert parts["text_length_filter"] == 0.0 and parts["captions"] > 0.05
    assert sum(parts.values()) == pytest.approx(explanation["gain"]["value"], abs=1e-12)
    assert explanation["trained"] == 3 <= foreseen["models"], "loops, duplicates and both; new captions have neither"
    assert not list(found.glob("*/merged")), "models that have answered are not kept"
    assert json.loads(captune("explain", run, "--dry-run", "--json"))["models"] == 0


def test_two_arms_that_differ_in_captions_alone_need_no_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of the gain is the captions'; with seeds, their luck is in the interval."""
    run = build(tmp_path, rows=20, questions=40, seeds=(0, 1))
    assert cli.main(["explain", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (cause,) = found["causes"]
    assert (cause["name"], found["trained"], found["seeds"]) == ("captions", 0, [0, 1])
    assert cause["part"] == pytest.approx(found["gain"]["value"]) and cause["interval"] == found["gain"]["interval"]
    assert cause["changed_rows"]["found"] > 0 and found["two_by_two"] is None
    assert cli.main(["explain", str(run)]) == 0
    assert capsys.readouterr().out.startswith("enhanced ")


def test_arms_of_the_run_that_are_all_coalitions_explain_it_at_once(tmp_path: Path) -> None:
    """With captions alone and filters alone among the arms, comparing them splits the gain of both; nothing else has
    such a split, and nothing is trained. Filters that drop none of the captions as found leave the baseline.
    """
    run = build(tmp_path, rows=20, questions=40, arms=FIVE)
    (run / "filters.yaml").write_text(yaml.safe_dump({"process": PROCESS}))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    for arm in FILTERED:
        recipe["arms"][arm]["recipe"] = str(run / "filters.yaml")
    recipe["train"]["instruct_data"] = str(run / "instruct.json")
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert cli.main(["run", str(run / "recipe.yaml"), "--stage", "compare"]) == 0
    assert [path.name for path in (run / "explain").iterdir()] == ["enhanced.json"]
    found = json.loads((run / "explain" / "enhanced.json").read_text())
    assert [cause["name"] for cause in found["causes"]] == ["captions", "filters"] and found["trained"] == 0
    assert sum(cause["part"] for cause in found["causes"]) == pytest.approx(found["gain"]["value"], abs=1e-12)
    accuracy = {
        name: arm["accuracy"] for name, arm in json.loads((run / "comparison.json").read_text())["arms"].items()
    }
    corners = dict(zip(("neither", "captions", "filters", "both"), ARMS_OF_CORNERS, strict=True))
    assert {corner: found["two_by_two"][corner] for corner in corners} == pytest.approx(
        {corner: accuracy[arm] for corner, arm in corners.items()}
    )
    assert "filters" in (run / "report" / "index.html").read_text()


def test_what_cannot_be_explained_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each in a sentence that names what is wrong; nothing is written."""
    run = build(tmp_path, rows=12, questions=20)

    def refused(*words: str, **changed: Any) -> str:
        recipe = yaml.safe_load((run / "recipe.yaml").read_text())
        arms = {name: {**own, **changed.get(name, {})} for name, own in recipe["arms"].items()}
        other = tmp_path / "other"
        shutil.copytree(run, other, dirs_exist_ok=True)
        (other / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "run_dir": str(other), "arms": arms}))
        assert cli.main(["explain", str(other), *words]) == 2
        assert not (other / "explain").exists()
        return capsys.readouterr().err

    assert "--arm original is the baseline itself" in refused("--arm", "original")
    assert "--arm nobody is no arm of the run" in refused("--arm", "nobody")
    assert "makes the same data as the baseline original" in refused(enhanced={"text": "caption"})
    assert "arms.enhanced.train: differs" in refused(enhanced={"train": {"method": "dora"}})
    assert "explain.budget is a number" in refused("--explain.budget", "-1")
    (run / "comparison.json").unlink()
    assert cli.main(["explain", str(run)]) == 2
    assert "no finished comparison there" in capsys.readouterr().err
    assert cli.main(["explain", str(tmp_path / "none")]) == 2
    assert "holds no run" in capsys.readouterr().err
