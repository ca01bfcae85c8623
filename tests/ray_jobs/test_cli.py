"""The command line: what it refuses, what it answers, and that it answers before anything heavy is imported."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from pipelines.errors import UserError
from ray_jobs import _options, cli
from ray_jobs.recipe import RECIPES, Recipe, recipe_yaml

ROOT = Path(__file__).parents[2]
OURS = sorted(path for path in RECIPES.glob("*.yaml") if "process" not in yaml.safe_load(path.read_text()))
JUICER = sorted(path for path in RECIPES.glob("*.yaml") if "process" in yaml.safe_load(path.read_text()))


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Standard error of a command that must end with status 2."""
    try:
        status = cli.main(list(argv))
    except SystemExit as end:
        status = end.code
    assert status == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_every_recipe_parses_with_the_command_that_reads_it(path: Path) -> None:
    recipe, _ = _options.parse("run", "", ["--config", path.stem])
    assert recipe.run_dir != Recipe().run_dir
    assert "original" in recipe.arms
    for config in recipe.arms.values():
        assert config.recipe is None or Path(config.recipe) in JUICER


@pytest.mark.parametrize("path", JUICER, ids=lambda path: path.stem)
def test_every_data_juicer_recipe_builds_its_operators(path: Path) -> None:
    from pipelines.refine.operators import build, read_recipe

    assert len(build(read_recipe(path))) >= 5


def test_a_recipe_may_change_a_few_keys_of_another() -> None:
    sample, _ = _options.parse("run", "", ["--config", "sample"])
    seeds, _ = _options.parse("run", "", ["--config", "sample_seeds", "--run_dir", sample.run_dir])
    changed = {key for key, value in asdict(seeds).items() if value != asdict(sample)[key]}
    assert changed == {"seeds"}


def test_one_key_moves_a_recipe_with_its_data() -> None:
    recipe, _ = _options.parse("run", "", ["--config", "sample", "--run_dir", "/shared/mine"])
    assert recipe.dataset == "/shared/mine/world/dataset.jsonl"
    assert recipe.sample.out == "/shared/mine/world"
    assert "${" not in recipe_yaml(recipe)


def test_the_resolved_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    """runs/NAME/recipe.yaml can be run again."""
    recipe, _ = _options.parse("run", "", ["--config", "sample", "--train.lora.rank", "8"])
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(recipe))
    again, _ = _options.parse("run", "", ["--config", str(tmp_path / "recipe.yaml")])
    assert again == recipe
    assert again.train.lora.rank == 8


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["caption", "--caption.batch_sizes", "3"], "caption.batch_sizes"),
        (["caption", "--caption.batch_size", "many"], "caption.batch_size"),
        (["caption", "--caption.batch_size", "0"], "caption.batch_size must be at least 1"),
        (["train", "--train.strategy", "fsdp"], "train.strategy must be ddp, zero2 or zero3"),
        (["caption", "--caption.model", "m"], "--input DATASET"),
        (["run", "no_such_recipe"], "no_such_recipe: no such recipe file"),
        (["captoin"], "did you mean 'caption'"),
        (["evaluate", "--output", "x"], "either --model DIR or --endpoint URL"),
    ],
)
def test_the_impossible_is_refused_with_status_2_and_names_the_key(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refusal(capsys, *argv)


def test_an_unknown_key_in_a_recipe_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text("caption:\n  batchsize: 3\n")
    assert "batchsize" in refusal(capsys, "caption", "--config", str(tmp_path / "r.yaml"))


def test_a_recipe_that_is_based_on_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(UserError, match="leads back to itself"):
        _options.parse("run", "", ["--config", str(tmp_path / "a.yaml")])


def test_help_and_refusals_come_before_heavy_imports() -> None:
    """`captune --help` and a wrong key answer at once: no torch, Ray, transformers or pyarrow is loaded for them."""
    code = (
        "import sys; from ray_jobs import cli\n"
        "cli.main(['--help'])\n"
        "assert cli.main(['caption', '--caption.batch_size', '0']) == 2\n"
        "assert cli.main(['run', 'sample', '--caption.batch_size', '0']) == 2\n"
        "print(sorted({'torch', 'ray', 'transformers', 'pyarrow', 'PIL', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_has_its_entrypoint(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`captune COMMAND --help` and `python ray_jobs/COMMAND.py` are the same thing."""
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    assert f"captune {command}" in capsys.readouterr().out
    if command != "k8s":  # renders manifests, on the machine of whoever applies them: no job of a cluster
        assert (ROOT / "ray_jobs" / f"{command.replace('-', '_')}.py").is_file()


def test_an_entrypoint_runs_by_its_path_from_elsewhere(tmp_path: Path) -> None:
    """What `ray job submit -- python ray_jobs/serve.py` does: the script's folder must not shadow the `serve`
    package.
    """
    script = ROOT / "ray_jobs" / "serve.py"
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "captune serve needs --model DIR" in done.stderr
