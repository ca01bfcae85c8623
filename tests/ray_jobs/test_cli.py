"""The command line: what it refuses, what it answers, and that it answers before anything heavy is imported."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import yaml
from PIL import Image

from pipelines.caption import stage
from pipelines.caption.config import CaptionConfig
from pipelines.errors import UserError
from pipelines.formats import open_dataset
from pipelines.manifest import open_stage
from pipelines.rundir import RunDir
from ray_jobs import caption, cli, merge, refine, run, train
from ray_jobs._options import parse
from ray_jobs.recipe import RECIPES, Recipe, paths, recipe_yaml

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
    recipe, _ = parse(run.COMMAND, [path.stem])
    assert recipe.run_dir != Recipe().run_dir
    assert recipe.compare.baseline_among(recipe.arms)
    for config in recipe.arms.values():
        assert config.recipe is None or Path(config.recipe) in JUICER


@pytest.mark.parametrize("path", JUICER, ids=lambda path: path.stem)
def test_every_data_juicer_recipe_builds_its_operators(path: Path) -> None:
    from pipelines.refine.operators import build, read_recipe

    assert len(build(read_recipe(path))) >= 5


def test_a_recipe_may_change_a_few_keys_of_another() -> None:
    sample, _ = parse(run.COMMAND, ["sample"])
    seeds, _ = parse(run.COMMAND, ["sample_seeds", "--run_dir", sample.run_dir])
    changed = {key for key, value in asdict(seeds).items() if value != asdict(sample)[key]}
    assert changed == {"seeds"}


def test_an_arm_may_train_in_a_way_of_its_own(tmp_path: Path) -> None:
    """Its keys stand in place of the recipe's, section by section, and the other arms know nothing of them."""
    file = tmp_path / "r.yaml"
    file.write_text(
        "base: sample\narms:\n  plain: {}\n  dora: {train: {method: dora, instruct: {learning_rate: 1.0e-3}}}\n"
    )
    recipe, _ = parse(run.COMMAND, [str(file)])
    plain, dora = recipe.training("plain"), recipe.training("dora", seed=3)
    assert plain == recipe.train and (dora.method, dora.seed, dora.instruct.learning_rate) == ("dora", 3, 1e-3)
    assert dora.instruct.steps == plain.instruct.steps and dora.align == plain.align
    for given, message in (
        ("{metod: dora}", r"arms.dora.train.metod: train has no such key; the nearest is method"),
        ("{align: {steps: many}}", r"arms.dora.train.align.steps: 'many' is not what"),
        ("{workers: 2}", r"arms.dora.train.workers is the same for all arms"),
        ("{method: lorra}", r"train.method must be one of"),
        ("7", r"--arms.dora.train: '7' is not a mapping"),
    ):
        with pytest.raises(UserError, match=message):
            parse(run.COMMAND, [str(file), "--arms.dora.train", given])


def test_one_key_moves_a_recipe_with_its_data() -> None:
    recipe, _ = parse(run.COMMAND, ["sample", "--run_dir", "/shared/mine"])
    assert recipe.dataset == "/shared/mine/world/dataset.jsonl"
    assert recipe.sample.out == "/shared/mine/world"
    assert "${" not in recipe_yaml(recipe)


def test_the_resolved_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    """runs/NAME/recipe.yaml can be run again."""
    recipe, _ = parse(run.COMMAND, ["sample", "--train.lora.rank", "8"])
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(recipe))
    again, _ = parse(run.COMMAND, [str(tmp_path / "recipe.yaml")])
    assert again == recipe
    assert again.train.lora.rank == 8


def test_a_run_can_be_repeated_from_anywhere_with_its_directory_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`recipe.yaml` has absolute paths and its own copy of the filters: the user's file may change or go."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(JUICER[0], tmp_path / "mine.yaml")
    recipe, _ = parse(run.COMMAND, ["sample", "--run_dir", "r", "--arms.enhanced.recipe", "mine.yaml"])
    recipe.caption.model = "Salesforce/blip2-opt-2.7b"  # a hub id is no path
    kept = run.keep(recipe, RunDir(tmp_path / "r"))
    (tmp_path / "mine.yaml").unlink()
    monkeypatch.chdir("/")
    again, _ = parse(run.COMMAND, [str(tmp_path / "r" / "recipe.yaml")])
    assert again == kept
    assert again.caption.model == "Salesforce/blip2-opt-2.7b"
    assert Path(again.arms["enhanced"].recipe or "").read_bytes() == JUICER[0].read_bytes()
    values = {key: path for key, path in paths(again).items() if key != "caption.model"}
    assert {"run_dir", "dataset", "train.model", "arms.enhanced.recipe"} <= set(values)
    assert all(path.startswith(str(tmp_path / "r")) for path in values.values())
    assert run.keep(again, RunDir(tmp_path / "r")) == again


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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "dataset: x\ncaption:\n  batchsize: 3\n",
            "r.yaml:3: no recipe has a key caption.batchsize; the nearest is caption.batch_size",
        ),
        ("trian:\n  seed: 3\n", "r.yaml:1: no recipe has a key trian; the nearest is train"),
        (
            "arms:\n  a: {}\n  b: {recip: x}\n",
            "r.yaml:3: no recipe has a key arms.b.recip; the nearest is arms.b.recipe",
        ),
        ("caption:\n\n  batch_size: many\n", "r.yaml:3: caption.batch_size: 'many' is not a whole number or auto"),
        ("caption:\n  batch_size:\n", "r.yaml:2: caption.batch_size: 'null' is not a whole number or auto"),
        ("caption:\n  batch_size: 0\n", "r.yaml:2: caption.batch_size must be at least 1"),
        ("caption: 3\n", "r.yaml:1: caption is a section"),
        ("caption:\n  actors: 2\n  actors: 3\n", "r.yaml:3: caption.actors stands in line 2 already"),
        ("caption: {model: 3, \n", "r.yaml:2: not valid YAML"),
        ("caption:\n  model: ${HOME}/blip2\n", "r.yaml:2: caption.model: '${HOME}' stands for nothing"),
        ("process:\n  - text_length_filter:\n", "r.yaml: a Data-Juicer recipe"),
    ],
)
def test_what_is_wrong_in_a_recipe_file_is_named_by_its_line(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(text)
    told = refusal(capsys, "caption", "x", "--output", "y", "--config", str(tmp_path / "r.yaml"))
    assert words in told
    assert len(told.splitlines()) <= 2


def test_an_option_that_a_command_does_not_use_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    told = refusal(capsys, "stats", "X", "--train.lora.rank", "64")
    assert "captune stats does not use the section train of a recipe, and so not --train.lora.rank" in told
    assert len(told.splitlines()) == 2
    assert "did you mean --dry-run?" in refusal(capsys, "caption", "--dryrun")
    assert "what is 'Y' for?" in refusal(capsys, "stats", "X", "Y")
    assert "--output needs a value" in refusal(capsys, "refine", "X", "--output", "--json")
    assert "none of llava, datajuicer" in refusal(capsys, "export", "X", "--output", "y", "--format", "lava")


def test_a_recipe_file_may_hold_what_other_commands_use(tmp_path: Path) -> None:
    """Their sections are neither built nor checked; an arm without keys is one with defaults."""
    (tmp_path / "r.yaml").write_text(
        "train: {seed: many, model: '${nowhere}'}\nmerge: {tolerance: 0.5}\narms: {a: , b: {}}\n"
    )
    recipe, options = parse(merge.COMMAND, ["A", "--output", "o", "--model", "m", "--config", str(tmp_path / "r.yaml")])
    assert (recipe.merge.tolerance, recipe.train.model, options.adapter) == (0.5, "m", "A")
    (tmp_path / "r.yaml").write_text("compare: {baseline: a}\narms: {a: , b: {}}\n")
    assert list(parse(run.COMMAND, [str(tmp_path / "r.yaml")])[0].arms) == ["a", "b"]


def test_words_of_a_command() -> None:
    """Flags take no value (older scripts give one), a bare word goes where people expect it, `=` joins."""
    for words, restart in ((["--restart"], True), (["--restart", "true"], True), (["--restart", "false"], False)):
        recipe, options = parse(caption.COMMAND, [*words, "D", "--output=o", "--caption.guards.min_rows=3"])
        assert (recipe.dataset, options.output, options.restart) == ("D", "o", restart)
        assert recipe.caption.guards.min_rows == 3
    recipe, options = parse(train.COMMAND, ["--json", "D", "--model", "m", "--output", "o", "--train.seed", "-1"])
    assert options.json and not options.restart and recipe.train.seed == -1
    assert parse(run.COMMAND, ["sample", "--seeds", "[3, 4]", "--train.use_gpu", "true"])[0].seeds == [3, 4]
    assert parse(refine.COMMAND, ["D", "--output", "o", "--refine.recipe", "null"])[0].refine.recipe is None


def test_home_is_expanded_wherever_a_path_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    recipe, options = parse(caption.COMMAND, ["--input=~/pairs", "--output=~/out", "--caption.prompt=~/not a path"])
    assert (recipe.dataset, options.output, recipe.caption.prompt) == (
        "/home/ada/pairs",
        "/home/ada/out",
        "~/not a path",
    )
    recipe, _ = parse(run.COMMAND, ["sample", "--run_dir=~/runs", "--arms.enhanced.recipe=~/filters.yaml"])
    assert recipe.dataset == "/home/ada/runs/world/dataset.jsonl"
    assert recipe.arms["enhanced"].recipe == "/home/ada/filters.yaml"


def test_a_recipe_that_is_based_on_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(UserError, match="leads back to itself"):
        parse(run.COMMAND, [str(tmp_path / "a.yaml")])


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
def test_every_command_has_its_entrypoint_and_a_help_on_one_screen(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`captune COMMAND --help` and `python ray_jobs/COMMAND.py` are the same thing; its example is understood."""
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    told = capsys.readouterr().out
    assert f"usage: captune {command}" in told
    lines = told.splitlines()
    assert max(map(len, lines)) <= 120
    assert len(lines) <= (60 if command in ("run", "k8s", "forecast") else 40)
    words = shlex.split(lines[lines.index("example:") + 1].partition("|")[0])
    assert words[0] == "captune" and words[1] in cli.COMMANDS
    module = importlib.import_module(cli.COMMANDS[command].room)
    about = module.COMMAND
    parse(about, [*words[1 + len(about.name.split()) :], "--config", "sample"])
    if command != "k8s":  # renders manifests, on the machine of whoever applies them: no job of a cluster
        assert (ROOT / "ray_jobs" / f"{command.replace('-', '_')}.py").is_file()


def test_help_explains_the_keys_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    for words, there, not_there in (
        (["train", "--train.lora.help"], "--train.lora.alpha 32", "--train.seed"),
        (["train", "--help-all"], "the update is scaled by alpha / r", "--caption"),
    ):
        with pytest.raises(SystemExit):
            cli.main(words)
        told = capsys.readouterr().out
        assert there in told and not_there not in told
        assert max(map(len, told.splitlines())) <= 120


def test_a_command_declares_every_section_that_it_uses() -> None:
    """What a command does not declare it would silently find at its defaults."""
    seen = set()
    for entry in cli.COMMANDS.values():
        module = importlib.import_module(entry.room)
        used = set(re.findall(r"recipe\.([a-z_]+)", inspect.getsource(module))) & {f.name for f in fields(Recipe)}
        declared = {read.split(".")[0] for read in module.COMMAND.reads} | {"run_dir"}
        assert used <= declared, entry.room
        seen |= used
    assert {"caption", "refine", "train", "merge", "serve", "evaluate", "compare"} <= seen, "the pattern finds them"


def test_an_entrypoint_runs_by_its_path_from_elsewhere(tmp_path: Path) -> None:
    """What `ray job submit -- python ray_jobs/serve.py` does: the script's folder must not shadow the `serve`
    package.
    """
    script = ROOT / "ray_jobs" / "serve.py"
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "captune serve needs --model DIR" in done.stderr


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (OSError(28, "No space left on device", "/x/part-0"), 1, "failed: /x/part-0: No space left on device"),
        (PermissionError(13, "Permission denied", "/x"), 2, "error: /x: Permission denied"),
        (NotADirectoryError(20, "Not a directory", "/x/y"), 2, "error: /x/y: Not a directory"),
        (OSError(30, "Read-only file system", "/x"), 2, "error: /x: Read-only file system"),
        (OSError("Traceback:\n  somewhere\nremote: No space left"), 1, "failed: remote: No space left"),
        (KeyboardInterrupt(), 130, "captune: stopped; the same command continues"),
    ],
)
def test_what_the_system_refuses_is_one_line(
    error: BaseException, status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(argv: list[str]) -> int:
        raise error

    assert cli.guarded(work, []) == status
    told = capsys.readouterr().err
    assert words in told and len(told.splitlines()) == 1


def test_an_output_that_is_a_file_or_below_one_is_refused_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "world"):
        assert str(output) in refusal(capsys, "sample", str(output), "--sample.pairs", "1")


def test_sigterm_ends_as_ctrl_c_does(tmp_path: Path) -> None:
    """With a sentence, and without the lock of its output left behind."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ray_jobs.cli", "sample", str(tmp_path / "w"), "--sample.pairs", "20000"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "w" / ".lock").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    _, told = process.communicate(timeout=60)
    assert process.returncode == 143
    assert told.splitlines()[-1] == "captune: stopped; the same command continues"
    assert not (tmp_path / "w" / ".lock").exists()


def test_what_is_complete_is_said_without_ray_and_torch(tmp_path: Path) -> None:
    """`captune caption` again on finished captions; the records themselves are not looked at."""
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "photos" / "a.png")
    model, out = ROOT / "pipelines" / "sample" / "models" / "blip2", tmp_path / "out"
    config = CaptionConfig(model=str(model))
    wanted = stage.inputs(open_dataset(str(tmp_path / "photos")), model, config)
    open_stage(out, "caption", wanted).finish(rows_in=1, rows_out=1, captioned=1)
    code = (
        "import sys; from ray_jobs import cli\n"
        "status = cli.main(sys.argv[1:])\n"
        "print(status, sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    words = ["caption", tmp_path / "photos", "--output", out, "--caption.model", model]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "complete already (1 rows)" in done.stderr
    assert "next: captune refine" in done.stderr
    assert done.stdout == "0 []\n"
