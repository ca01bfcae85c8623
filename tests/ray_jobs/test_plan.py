"""What `captune run` says before it works: everything that is missing at once, and the plan; and that the recipes which
come with captune fit the files that people have.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines import cost, machine
from pipelines.manifest import open_stage
from pipelines.sample.config import SampleConfig
from pipelines.sample.world import write_world
from ray_jobs import cli, run
from ray_jobs._options import parse
from ray_jobs.recipe import recipe_yaml
from tests.pipelines.tiny_parts import language_model, write_towers

ROOT = Path(__file__).parents[2]
GIB = 2**30
SMALL = SampleConfig(pairs=20, instructions=8, questions=8)
BROUGHT = {
    "dataset": "data/pairs.jsonl",
    "caption.model": "models/blip2-opt-2.7b",
    "train.model": "models/mgm-2b",
    "train.instruct_data": "data/instruct.json",
    "evaluate.annotations": "data/textvqa/TextVQA_0.5.1_val.json",
    "evaluate.images": "data/textvqa/train_images",
    "evaluate.ocr": "data/textvqa/TextVQA_Rosetta_OCR_v0.2_val.json",
}
"""Keys of files that people bring themselves, and where mgm2b_30k_published looks for them."""
PARTS = {
    "assemble.language_model": "models/gemma-2b-it",
    "assemble.clip": "models/clip-vit-large-patch14-336",
    "assemble.openclip": "models/clip-convnext-large-d-320",
}
"""What mgm2b_30k makes its base of, instead of `train.model`."""


@pytest.fixture(scope="module")
def brought(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as the README tells people to fill it; the sample's small models stand where the weights belong."""
    root = tmp_path_factory.mktemp("brought")
    world = root / "world"
    write_world(world, SMALL)
    (root / "data").mkdir()
    (root / "models").mkdir()
    for place, source in {
        "data/pairs.jsonl": "dataset.jsonl",
        "data/images": "images",
        "data/instruct.json": "instruct.json",
        "data/instruct": "instruct",
        "data/textvqa": "textvqa",
        "models/blip2-opt-2.7b": "models/blip2",
        "models/mgm-2b": "models/mgm",
    }.items():
        (root / place).symlink_to(world / source)
    for place, part in zip(PARTS.values(), (language_model(root / "gemma", "gemma"), *write_towers(root)), strict=True):
        (root / place).symlink_to(part)
    return root


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has what the largest recipe asks for."""
    monkeypatch.setattr(machine, "cpus", lambda: 64)
    monkeypatch.setattr(machine, "cards", lambda: (machine.Card("a card", 24 * GIB),) * 8)


def asked(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any]]:
    status = cli.main(["run", *argv, "--dry-run", "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_everything_that_is_missing_is_said_at_once_without_ray(tmp_path: Path) -> None:
    code = (
        "import sys; from ray_jobs import cli; status = cli.main(['run', 'mgm2b_30k'])\n"
        "print(status, sorted({'torch', 'ray', 'transformers', 'pyarrow'} & set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split(maxsplit=1) == ["2", "[]\n"]
    for key in (
        *(BROUGHT.keys() - {"train.model"}),
        *PARTS,
        "caption.gpus_per_actor",
        "train.use_gpu",
        "serve.gpus_per_replica",
    ):
        assert f"\n  {key}: " in done.stderr
    assert "train.model" not in done.stderr  # which the run makes
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("recipe", ["mgm2b_30k", "mgm2b_30k_published", "mgm2b_1m"])
def test_a_recipe_fits_the_published_layouts(
    recipe: str, brought: Path, large: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TextVQA's annotations hold no OCR tokens; all recipes ask for them, and find them in the Rosetta file."""
    monkeypatch.chdir(brought)
    moved = [word for key, place in BROUGHT.items() for word in (f"--{key}", place)] if recipe == "mgm2b_1m" else []
    status, plan = asked(capsys, recipe, *moved, "--run_dir", "runs/x")
    assert plan["problems"] == []
    assert status == 0
    found = {step["stage"]: step for step in plan["steps"]}
    assert ("assemble" in found) == (recipe == "mgm2b_30k")
    assert found["caption"]["rows"] == SMALL.pairs
    assert found["caption"]["memory"] > 0
    assert found["evaluate enhanced, seed 2"]["rows"] == SMALL.questions
    assert {step["state"] for step in plan["steps"]} == {"starts"}
    assert not (brought / "runs").exists()


def test_hours_are_those_of_a_finished_run_and_else_unknown(
    brought: Path, large: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its rates for other numbers of rows; not where another model or another kind of machine did the work."""
    monkeypatch.chdir(brought)
    words = ["mgm2b_30k_published", "--run_dir", str(tmp_path / "new"), "--seeds", "[0]"]
    recipe, run_dir = parse(run.COMMAND, words)[0], tmp_path / "old"
    run_dir.mkdir()
    (run_dir / "recipe.yaml").write_text(recipe_yaml(recipe))
    settings = {name: {"steps": 10, "batch": 8} for name in ("align", "instruct")}
    card = {"node_hours": 1.0, "cpu_hours": 4.0, "gpu_hours": 2.0, "cpu_hours_worked": 2.0, "gpu_hours_worked": 1.0}
    monkeypatch.setattr(cost.Meter, "stop", lambda self: {"train": card})
    facts = {"rows_in": {"align": 9, "instruct": 9}, "phases": dict.fromkeys(settings, {})}
    open_stage(run_dir / "enhanced" / "adapter", "train", {"config": settings}).finish(**facts)
    open_stage(run_dir / "captions", "caption", {}).finish(rows_in=10 * SMALL.pairs)

    _, plan = asked(capsys, *words, "--measured", str(run_dir))
    steps = {step["stage"]: step for step in plan["steps"]}
    train = recipe.training("enhanced", recipe.seeds[0])
    samples = sum(phase.steps * phase.per_step(train.workers) for phase in (train.align, train.instruct))
    assert samples == steps["train enhanced"]["rows"] > 0
    assert steps["train enhanced"]["hours"]["train"]["gpu_hours"] == pytest.approx(2.0 * samples / 160)
    assert steps["train enhanced"]["measured"] == "old/enhanced/adapter"
    assert steps["caption"]["hours"]["train"]["node_hours"] == pytest.approx(0.1)
    assert (steps["evaluate enhanced"]["hours"], steps["evaluate enhanced"]["measured"]) == ({}, "")
    assert cli.main(["run", *words, "--dry-run", "--measured", str(run_dir)]) == 0
    assert "unknown: refine original" in capsys.readouterr().out

    other = ["--train.model", "models/mgm-2b/", "--train.method", "dora"]
    _, plan = asked(capsys, *words, *other, "--measured", str(run_dir))
    assert {step["stage"]: step for step in plan["steps"]}["train enhanced"]["hours"] == {}
    assert cli.main(["run", *words, "--dry-run", "--measured", str(tmp_path / "none")]) == 2


def test_without_the_rosetta_file_the_recipe_is_refused(
    brought: Path, large: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(brought)
    status, plan = asked(capsys, "mgm2b_30k", "--evaluate.ocr", "")
    assert status == 2
    assert [problem["key"] for problem in plan["problems"]] == ["evaluate.annotations"]
    assert "has no 'ocr_tokens'" in plan["problems"][0]["message"]


def test_wrong_operators_and_directories_of_others_are_found(
    brought: Path, large: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(brought)
    (tmp_path / "own.yaml").write_text("process:\n  - words_number_filter: {min_num: 3}\n")
    status, plan = asked(capsys, "mgm2b_30k", "--arms.enhanced.recipe", str(tmp_path / "own.yaml"))
    assert (status, plan["problems"][0]["key"]) == (2, "arms.enhanced.recipe")
    assert "words_num_filter" in plan["problems"][0]["message"]
    (tmp_path / "run" / "captions").mkdir(parents=True)
    (tmp_path / "run" / "captions" / "notes.txt").write_text("mine")
    status, plan = asked(capsys, "mgm2b_30k", "--run_dir", str(tmp_path / "run"))
    assert status == 2
    assert [problem["key"] for problem in plan["problems"]] == ["caption"]


def test_init_writes_a_recipe_that_this_machine_can_run(
    brought: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(brought)
    monkeypatch.setattr(machine, "cards", lambda: ())
    output = tmp_path / "my.yaml"
    words = ["init", "data/pairs.jsonl", "--blip2", "models/blip2-opt-2.7b", "--mgm", "models/mgm-2b"]
    words += ["--textvqa", "data/textvqa", "--instruct", "data/instruct.json", "--output", str(output)]
    assert cli.main(words) == 0
    status, plan = asked(capsys, str(output), "--run_dir", str(tmp_path / "run"))
    assert (status, plan["problems"]) == (0, [])
    assert cli.main(words) == 2  # it overwrites nothing
    assert "is there already" in capsys.readouterr().err


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_the_reference_recipe_really_runs(brought: Path) -> None:
    """Every stage of mgm2b_30k on twenty rows, from a Gemma, a CLIP and a ConvNeXt to a tuned, merged and served model
    that answers: its files, arms, phases, precision and OCR tokens; without its card, and with fewer steps. One arm
    learns a prefix, which its model carries through serving and evaluation.
    """
    options = {
        "seeds": "[0]",
        "assemble.image_size_aux": 128,
        "caption.gpus_per_actor": 0,
        "caption.cpus_per_actor": 0.9,
        "train.use_gpu": "false",
        "train.cpus_per_worker": 1,
        "train.max_length": 512,
        "train.align.steps": 1,
        "train.align.batch": 16,
        "train.instruct.steps": 1,
        "train.instruct.batch": 16,
        "serve.gpus_per_replica": 0,
        "arms.enhanced.train": "{method: prefix}",
    }
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "ray_jobs.cli", "run", "mgm2b_30k", *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.run(command, cwd=brought, env=env, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr[-4000:]
    run = brought / "runs" / "mgm2b_30k"
    assert json.loads((run / "base" / "MANIFEST.json").read_text())["language_model"] == "gemma"
    for arm in ("original", "enhanced"):
        scores = json.loads((run / arm / "predictions" / "textvqa" / "scores.json").read_text())
        assert (scores["count"], scores["errors"]) == (SMALL.questions, 0)
        assert scores["ocr_tokens"] is True
        asked_for = (run / arm / "predictions" / "textvqa" / "predictions.jsonl").read_text().splitlines()
        assert len(asked_for) == SMALL.questions
        assert all("Reference OCR token: " in json.loads(line)["prompt"] for line in asked_for)
    assert (run / "report" / "index.html").is_file()
    merged = {arm: json.loads((run / arm / "merged" / "MANIFEST.json").read_text()) for arm in ("original", "enhanced")}
    assert merged["original"]["lora"] and merged["enhanced"]["carried"] == "prefix"
    started = time.monotonic()
    again = subprocess.run(command, cwd=brought, env=env, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr[-4000:]
    assert "ray: started" not in again.stderr and "assemble: " not in again.stderr
    assert time.monotonic() - started < 60
    # The base is made of its parts whenever it is wanted; what was trained on it is still known as such.
    shutil.rmtree(run / "base")
    plan = subprocess.run([*command, "--dry-run", "--json"], cwd=brought, env=env, capture_output=True, check=True)
    states = {step["stage"]: step["state"] for step in json.loads(plan.stdout)["steps"]}
    assert states.pop("assemble") == "starts" and set(states.values()) == {"complete"}
