"""Several benchmarks at once: one command, one service, a comparison of each, and the page that shows them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipelines.evaluate import stage
from pipelines.evaluate.config import EvaluateConfig
from pipelines.rundir import RunDir
from ray_jobs import cli
from ray_jobs._options import parse
from ray_jobs.recipe import recipe_yaml
from ray_jobs.run import COMMAND, conclude

Benchmark = Callable[..., tuple[Path, Path]]


@pytest.fixture
def files(tmp_path: Path, benchmark: Benchmark) -> dict[str, tuple[Path, Path]]:
    """TextVQA with 12 questions and POPE with as many about the same pictures."""
    annotations, images = benchmark(12)
    lines = [{"question_id": n, "image": f"pic{n}.jpg", "text": f"Is it {n}?", "label": "yes"} for n in range(12)]
    pope = tmp_path / "coco_pope_random.json"
    pope.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"textvqa": (annotations, images), "pope": (pope, images)}


def words(files: dict[str, tuple[Path, Path]], *names: str) -> list[str]:
    """The files of benchmarks as the command line takes them."""
    pairs = zip(("--annotations", "--images"), zip(*(files[name] for name in names), strict=True), strict=True)
    return [word for option, paths in pairs for name, path in zip(names, paths, strict=True) for word in
            (option, f"{name}={path}")]  # fmt: skip


def test_one_command_asks_one_endpoint_all(
    tmp_path: Path, files: dict[str, tuple[Path, Path]], endpoint: Any, capsys: Any
) -> None:
    out = tmp_path / "out"
    argv = ["evaluate", "--benchmark", "textvqa,pope", "--endpoint", endpoint.url, "--output", str(out)]
    assert cli.main([*argv, *words(files, "textvqa", "pope"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["textvqa"]["accuracy"] == 1.0 and found["pope"]["figures"]["recall"] == 1.0
    assert json.loads((out / "pope" / "scores.json").read_text())["count"] == 12
    assert len(endpoint.bodies) == 24
    assert cli.main([*argv, *words(files, "textvqa", "pope")]) == 0 and len(endpoint.bodies) == 24
    assert "TextVQA: 100.00 %" in (said := capsys.readouterr().out) and "POPE: 100.00 %" in said

    assert cli.main([*argv, *words(files, "textvqa")]) == 2
    assert "evaluate.also.pope.annotations: name the benchmark's annotation file" in capsys.readouterr().err
    assert cli.main([*argv, "--annotations", "vqav2=x"]) == 2
    assert "--benchmark names textvqa, pope, and not 'vqav2'" in capsys.readouterr().err


def test_a_model_is_served_once_for_all_and_only_if_there_is_something_to_ask(
    tmp_path: Path, files: dict[str, tuple[Path, Path]], endpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "model_identity", lambda model: "a" * 32)
    endpoint.is_captune("a" * 32)
    started = []

    @contextmanager
    def service() -> Iterator[str]:
        started.append("up")
        yield endpoint.url
        started.append("down")

    also = {"pope": dict(zip(("annotations", "images"), map(str, files["pope"]), strict=True))}
    config = EvaluateConfig(annotations=str(files["textvqa"][0]), images=str(files["textvqa"][1]), also=also)
    for _ in range(2):
        with stage.kept(service()) as kept:
            for name, each in config.each().items():
                stage.run(tmp_path / name, each, stage.Served(tmp_path, kept))
    assert started == ["up", "down"]


def test_a_run_compares_its_arms_on_each(
    tmp_path: Path, files: dict[str, tuple[Path, Path]], endpoint: Any, capsys: Any
) -> None:
    """The recipe's first benchmark gives the verdict; the others' comparisons stand beside it, and on the page."""
    root = tmp_path / "run"
    recipe_file = tmp_path / "recipe.yaml"
    textvqa, pope = files["textvqa"], files["pope"]
    recipe_file.write_text(f"""
run_dir: {root}
dataset: {tmp_path}
arms: {{original: {{text: caption}}, enhanced: {{text: recaption}}}}
evaluate:
  benchmark: textvqa
  annotations: {textvqa[0]}
  images: {textvqa[1]}
  also:
    pope: {{annotations: "{pope[0]}", images: "{pope[1]}"}}
""")
    recipe, _ = parse(COMMAND, [str(recipe_file)])
    assert recipe.evaluate.each()["pope"].annotations == str(pope[0])
    for arm, says in (("original", "no"), ("enhanced", "")):
        endpoint.says = says
        for name, (questions, images) in files.items():
            place = RunDir(root).walk(arm, 0).evaluation(name).directory
            argv = ["evaluate", "--benchmark", name, "--annotations", str(questions), "--images", str(images)]
            assert cli.main([*argv, "--endpoint", endpoint.url, "--output", str(place)]) == 0
    capsys.readouterr()
    conclude(recipe)
    said = capsys.readouterr().err
    assert "TextVQA: enhanced 100.0 %, original 0.0 %" in said and "POPE: enhanced 100.0 %, original 0.0 %" in said
    comparison = json.loads((root / "comparison.json").read_text())
    assert comparison["benchmark"] == "textvqa" and comparison["also"]["pope"]["benchmark"] == "pope"
    assert comparison["also"]["pope"]["differences"]["enhanced"]["excludes_zero"]

    (root / "recipe.yaml").write_text(recipe_yaml(recipe))
    argv = ["compare", str(root), "--output", str(tmp_path / "compared"), "--compare.baseline", "run/original"]
    assert cli.main([*argv, "--benchmark", "pope"]) == 0 and "run/enhanced 100.0 %" in capsys.readouterr().out
    assert json.loads((tmp_path / "compared" / "comparison.json").read_text())["benchmark"] == "pope"
    assert cli.main([*argv, "--benchmark", "vqav2"]) == 2
    assert "original was asked pope, textvqa, and not 'vqav2'" in capsys.readouterr().err

    recipe_file.write_text("evaluate: {also: {pope: {anotations: x}}}\n")
    assert cli.main(["run", str(recipe_file)]) == 2
    assert "evaluate.also.pope.anotations: a further benchmark's own keys are annotations" in capsys.readouterr().err
