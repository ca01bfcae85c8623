"""The whole hallway on a small sample: every stage on its real library, killed in the middle, finished by the same
command.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.rundir import Stage

ROOT = Path(__file__).parents[2]


def command(root: Path, **others: int) -> list[str]:
    root.mkdir(exist_ok=True)
    recipe = root / "recipe.yaml"
    arms = "original: {text: caption}, enhanced: {text: recaption, recipe: refine_captions.yaml}"
    recipe.write_text(f"base: sample\narms: {{{arms}}}\n")
    options = {
        "run_dir": root / "run",
        "sample.pairs": 60,
        "sample.instructions": 16,
        "sample.questions": 24,
        "train.align.steps": 6,
        "train.instruct.steps": 3,
        "train.checkpoint_every": 2,
        **others,
    }
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-m", "ray_jobs.cli", "run", str(recipe), *words]


def run(root: Path, **others: int) -> str:
    done = subprocess.run(command(root, **others), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def kill_when(root: Path, sign: str) -> None:
    """`kill -9` the driver as soon as a file in its run directory fits the pattern `sign`."""
    process = subprocess.Popen(command(root), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 900
    try:
        while not any((root / "run").glob(sign)):
            assert process.poll() is None, f"the run ended before {sign} was there"
            assert time.monotonic() < deadline, f"{sign} never came"
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()


@pytest.mark.heavy
@pytest.mark.timeout(2400)
def test_a_killed_run_ends_with_the_scores_of_an_undisturbed_one(tmp_path: Path) -> None:
    """Killed while it trains and evaluates, two models at once where the undisturbed one has them in turn; rows in
    equal rows out, and a third run finds everything done. (A captioning driver is killed in a test of its stage.)
    """
    run(tmp_path / "whole", side_by_side=1)
    killed = tmp_path / "killed"
    for sign in ("original/adapter/log.jsonl", "original/predictions/textvqa/journal.jsonl"):
        kill_when(killed, sign)
        if sign.endswith("log.jsonl"):
            states = [Stage(killed / "run" / arm / "adapter").state for arm in ("original", "enhanced")]
            assert states == ["unfinished", "unfinished"]
    run(killed)
    for root in (tmp_path / "whole", killed):
        captions = json.loads((root / "run" / "captions" / "MANIFEST.json").read_text())
        assert captions["rows_in"] == captions["rows_out"] == 60
        for arm in ("original", "enhanced"):
            dataset = json.loads((root / "run" / arm / "dataset" / "MANIFEST.json").read_text())
            assert dataset["kept"] + dataset["rejected"] == dataset["rows_in"] == 60
        assert (root / "run" / "report" / "index.html").stat().st_size > 10_000
    answers = [
        [
            [json.loads(line)["text"] for line in (root / "run" / arm / "predictions/textvqa/predictions.jsonl").open()]
            for arm in ("original", "enhanced")
        ]
        for root in (tmp_path / "whole", killed)
    ]
    assert answers[0] == answers[1]
    assert len(answers[0][0]) == 24

    again = run(killed)
    assert "steps/s" not in again
    assert "questions/s" not in again
