"""Arms that differ in their data: caption sets, the control without any, and arms whose data turn out equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.rundir import collect
from ray_jobs import cli

SMALL = "sample: {pairs: 12, instructions: 10, questions: 6}\n"
SHORT = (
    "train: {held_out: 0, align: {steps: 2, template: plain, micro_batch: 4}, instruct: {steps: 1, micro_batch: 4}}\n"
)


def write(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(f"base: sample\nrun_dir: {folder}/run\n{SMALL}{SHORT}{text}")
    return str(path)


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert cli.main(["run", *words, "--dry-run", "--json"]) == 0
    return {step["stage"]: step for step in json.loads(capsys.readouterr().out)["steps"]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("captions: {a: {modle: x}}", "recipe.yaml:5: captions.a.modle: caption has no such key; the nearest is model"),
        ("captions: {a: 3}", "captions.a: '3' is neither keys of caption"),
        ("captions: {a: {actors: 2}}", "captions.a.actors is the same for all caption sets"),
        ("captions: {a: {decoding: {method: best}}}", "captions.a.decoding.method must be one of greedy"),
        ("captions: {'a/b': found}", "captions.a/b: a caption set's name becomes a directory"),
        ("arms: {x: {captions: a}}", "recipe.yaml:5: arms.x.captions: there is no caption set 'a' (there are none"),
        ("captions: {a: found}\narms: {x: {text: recaption}}", "arms.x.text: a holds the captions as found"),
        ("captions: {a: found}\narms: {x: {mix: {by: both}}}", "arms.x.mix: mixes the captions as found with new"),
        ("arms: {x: {mix: {by: random}}}", "arms.x.mix.share is not set"),
        ("arms: {x: {mix: {by: best}}}", "arms.x.mix.by must be one of none, random, score, both, not 'best'"),
        ("arms: {x: {mix: {by: score, score: num_words}}}", "arms.x.mix.score: there is no recipe"),
        ("arms: {x: {subset: {rows: 0}}}", "arms.x.subset.rows must be at least 1, not 0"),
        ("arms: {x: {align: no}}", "'False' is not text"),
        ("arms: {x: {align: none, subset: {rows: 3}}}", "arms.x.subset is of no use with align: none"),
        ("arms: {x: {align: none}}\ntrain: {instruct: {steps: 0}}", "arms.x.align: none leaves nothing to train"),
        ("arms: {x: {instruct_data: gone.json}}", "arms.x.instruct_data: "),
        ("arms: {x: {train: {instruct_data: a.json}}}", "the same for all arms: set arms.x.instruct_data"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"base: sample\nrun_dir: {tmp_path}/run\n\n{SMALL}{text}\n")
    assert cli.main(["run", str(path), "--dry-run"]) == 2
    assert said in capsys.readouterr().err


def test_each_caption_set_is_made_once_and_the_control_needs_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = "captions: {greedy: {}, sampled: {decoding: {method: sample}}, alt: found}\n"
    arms = "a: {}, b: {recipe: refine_captions.yaml}, c: {captions: sampled}, d: {captions: alt}, none: {align: none}"
    path = write(tmp_path, f"{sets}arms: {{{arms}, e: {{recipe: refine_captions.yaml}}}}\ncompare: {{baseline: d}}\n")
    steps = planned(capsys, path)
    assert [name for name in steps if name.startswith("caption")] == [
        "caption greedy",
        "caption sampled",
        "caption alt",
    ]
    assert [name for name in steps if name.startswith("refine")] == [f"refine {arm}" for arm in "abcde"]
    assert steps["caption alt"]["directory"] == str(tmp_path / "run" / "captions" / "alt")
    assert steps["refine c"]["work"].startswith("text: recaption")
    assert steps["refine d"]["work"].startswith("text: caption")
    assert "align" not in steps["train none"]["work"]
    assert steps["train e"]["work"] == "as b: their data are equal" and steps["train e"]["rows"] is None
    assert cli.main(["run", path, "--stage", "caption", "--set", "other"]) == 2
    assert "--set other: the recipe's caption sets are greedy, sampled, alt" in capsys.readouterr().err
    only = write(tmp_path, "arms: {none: {align: none}}\ncompare: {baseline: none}\n")
    assert not [name for name in planned(capsys, only) if name.startswith(("caption", "refine"))]
    assert cli.main(["run", only, "--stage", "caption"]) == 2
    assert "nothing to do for an arm with align: none" in capsys.readouterr().err


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_equal_data_are_trained_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Arms that come to the same rows in different ways share files, under manifests of their own; also when a single
    stage is done again; a run without a captioner goes to its end.
    """
    arms = "original: {}, again: {subset: {rows: 1000}}, none: {align: none}"
    path = write(tmp_path, f"captions: {{alt: found}}\narms: {{{arms}}}\n")
    assert cli.main(["run", path]) == 0
    said = capsys.readouterr().err
    assert "train again: taken from original, whose data are equal" in said
    assert "evaluate again: taken from original, whose data are equal" in said
    run = collect(tmp_path / "run")
    walks = {walk.arm: walk for walk in run.walks}
    mine, theirs = walks["again"], walks["original"]
    for one, other in ((mine.adapter, theirs.adapter), (mine.merged, theirs.merged)):
        assert one.manifest["same_as"] == "original" and one.inputs != other.inputs
        (file, *_) = one.directory.glob("*.safetensors")
        assert file.samefile(other.directory / file.name)
    found = run.comparison
    assert found["differences"]["again"]["difference"] == 0
    assert found["arms"]["none"]["accuracy"] >= 0 and "none" not in run.datasets
    assert "same_as" not in walks["none"].adapter.manifest
    before = (theirs.adapter.directory / "adapter_model.safetensors").read_bytes()

    assert cli.main(["run", path, "--stage", "train", "--arm", "again", "--restart"]) == 0
    again = capsys.readouterr().err
    assert "train again: taken from original" in again and "ray: started" not in again
    assert (theirs.adapter.directory / "adapter_model.safetensors").read_bytes() == before
    steps = planned(capsys, path)
    assert steps["train again"]["state"] == steps["evaluate none"]["state"] == "complete"
    (mine.adapter.directory / "MANIFEST.json").unlink()  # as if killed
    assert planned(capsys, path)["train again"]["work"] == "as original: their data are equal"
