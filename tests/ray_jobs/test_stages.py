"""One stage of a recipe as a job does it: what it waits for, what it was refused before, and others beside it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ray_jobs import cli
from ray_jobs.recipe_file import digest, files_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write(tmp_path, 8)


def write(folder: Path, pairs: int) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(
        f"base: sample\nrun_dir: {folder}/run\narms: {{original: {{text: caption}}}}\n"
        f"sample: {{pairs: {pairs}, instructions: 4, questions: 4}}\n"
    )
    return path


def job(recipe: Path, *words: str) -> int:
    """The command of a cluster's job."""
    return cli.main(["run", str(recipe), *words, "--recipe-is", digest(files_of(str(recipe)))])


def test_what_a_job_was_refused_ends_its_next_attempt_until_somebody_decides(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same sentence and status, and no work; a person at a terminal, another recipe and the preflight try again."""
    world = recipe.parent / "run" / "world"
    world.mkdir(parents=True)
    (world / "mine.txt").touch()
    assert job(recipe, "--stage", "sample") == 2
    first = capsys.readouterr().err.splitlines()
    assert "already holds files that no captune stage wrote" in first[0] and len(first) == 1
    (world / "mine.txt").unlink()
    assert job(recipe, "--stage", "sample") == 2
    again = capsys.readouterr().err.splitlines()
    assert again[0] == first[0] and "run the preflight, or remove" in again[1] and not list(world.iterdir())
    assert job(recipe, "--preflight") == 0
    assert job(recipe, "--stage", "sample") == 0

    (world / "MANIFEST.json").unlink()
    (world / ".stage.json").unlink()
    assert job(recipe, "--stage", "sample") == 2
    other = write(recipe.parent, 9)
    assert job(other, "--stage", "sample") == 2, "a new decision, which meets the same files"
    assert "An attempt of" not in capsys.readouterr().err.splitlines()[-1]


def test_the_preflight_finds_what_only_the_last_stages_need(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong base and a missing benchmark, before any cluster; it needs no cards, whatever the recipe asks for."""
    words = ["--train.model", "/models/none", "--assemble.from_mgm=", "--train.use_gpu", "true"]
    assert cli.main(["run", str(recipe), "--preflight", *words, "--evaluate.annotations", "/data/none.json"]) == 2
    said = capsys.readouterr().err
    assert "train.model: /models/none: no such model directory" in said
    assert "evaluate.annotations: /data/none.json" in said
    assert "GPU" not in said


def test_a_stage_says_what_comes_first(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job(recipe, "--stage", "train", "--arm", "original") == 2
    said = capsys.readouterr().err
    for stage in ("sample", "assemble", "refine --arm original"):
        assert f"captune run RECIPE --stage {stage}\n" in said
    assert not (recipe.parent / "run" / "original").exists()


@pytest.mark.parametrize(("first", "second"), [("whole", "stage"), ("stage", "whole"), ("stage", "stage")])
def test_a_second_job_on_one_run_directory_is_refused_in_one_line(recipe: Path, first: str, second: str) -> None:
    """Another process holds the run directory, or the one stage that is at work in it."""
    run = recipe.parent / "run"
    busy = run if first == "whole" else run / "world"
    held = (
        "import sys; from pathlib import Path; from pipelines import lock\n"
        "at = Path(sys.argv[1]); at.mkdir(parents=True); lock.hold(at); print('held', flush=True); sys.stdin.readline()"
    )
    pipe = subprocess.PIPE
    holder = subprocess.Popen([sys.executable, "-c", held, str(busy)], cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    words = ["--stage", "sample"] if second == "stage" else []
    code = "import sys; from ray_jobs import cli, run; run.PATIENCE_S = 1.0; sys.exit(cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "run", str(recipe), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    holder.communicate("\n")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and f"{busy}: process {holder.pid} on " in done.stderr
    assert not (run / "recipe.yaml").exists() or first == "stage"
