from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.adapters.check import check_adapter, check_model
from pipelines.errors import UserError
from pipelines.mgm.adapter import CONFIG, NON_LORA, WEIGHTS
from ray_jobs import cli

MODEL = "model.safetensors"
Tensors = dict[str, torch.Tensor]


def _failed(verdicts: list[Any]) -> dict[str, str]:
    return {verdict.name: verdict.detail for verdict in verdicts if not verdict.passed}


def _edit(directory: Path, file: str, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(directory / file)
    change(tensors)
    save_file(tensors, directory / file, metadata={"format": "pt"})


def _edit_json(directory: Path, file: str, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads((directory / file).read_text())
    change(values)
    (directory / file).write_text(json.dumps(values))


def _set(name: str, value: Any) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: value(tensors[name]) if callable(value) else value})


def test_a_sound_model_and_adapter_pass(model_dir: Path, adapter_dir: Path) -> None:
    """Every check of the issue is there, and none cries wolf."""
    verdicts = check_model(model_dir)
    assert not _failed(verdicts)
    assert {v.name for v in verdicts} == {
        "files", "missing tensors", "unexpected tensors", "shapes", "finite", "all-zero", "dtype",
        "tokenizer",
        "sees the image", "generation stops",
    }  # fmt: skip
    verdicts = check_adapter(adapter_dir, model_dir)
    assert not _failed(verdicts)
    assert {v.name for v in verdicts} == {
        "files", "base", "method", "empty tensors", "finite", "targets", "shapes", "trained whole", "effect",
    }  # fmt: skip


PROJ = "model.uni_query.proj.weight"


@pytest.mark.parametrize(
    ("verdict", "change"),
    [
        ("missing tensors", lambda tensors: tensors.pop(PROJ)),
        ("unexpected tensors", lambda tensors: tensors.update(stray=torch.ones(1))),
        ("shapes", _set(PROJ, torch.ones(3, 3))),
        ("finite", _set(PROJ, lambda t: t * float("nan"))),
        ("all-zero", _set(PROJ, torch.zeros_like)),
        ("dtype", _set(PROJ, lambda t: t.half())),
        ("files", lambda tensors: [tensors.pop(n) for n in list(tensors) if ".vision_tower_aux." in n]),
        ("all-zero", _set("model.vision_tower_aux.embeddings.layernorm.weight", torch.zeros_like)),
        ("sees the image", _set("model.multi_modal_projector.2.weight", torch.zeros_like)),
    ],
)
def test_faults_of_weights_are_found(
    model_dir: Path, tmp_path: Path, verdict: str, change: Callable[[Tensors], None]
) -> None:
    """Each planted fault turns its own verdict."""
    broken = shutil.copytree(model_dir, tmp_path / "broken")
    _edit(broken, MODEL, change)
    assert verdict in _failed(check_model(broken))


def test_faults_of_files_are_found(model_dir: Path, tmp_path: Path) -> None:
    """Truncated weights, a stop token that no answer ends with, and an image token that differs."""
    broken = shutil.copytree(model_dir, tmp_path / "a")
    (broken / MODEL).write_bytes((broken / MODEL).read_bytes()[:1000])
    assert "not a readable safetensors" in _failed(check_model(broken))["files"]

    broken = shutil.copytree(model_dir, tmp_path / "b")
    _edit_json(broken, "generation_config.json", lambda values: values.update(eos_token_id=50))
    assert "<end_of_turn>" in _failed(check_model(broken))["generation stops"]

    broken = shutil.copytree(model_dir, tmp_path / "c")
    _edit_json(broken, "config.json", lambda values: values.update(image_token_id=3))
    assert "image_token_id 3" in _failed(check_model(broken))["tokenizer"]

    assert "files" in _failed(check_model(tmp_path))
    with pytest.raises(UserError, match="no such directory"):
        check_model(tmp_path / "none")


def test_experts_of_a_mixtral_are_known_by_their_names_in_files(mixtral_dir: Path, tmp_path: Path) -> None:
    """In memory they are one tensor a layer, in files one tensor an expert; a missing one is named."""
    assert not _failed(check_model(mixtral_dir))
    broken = shutil.copytree(mixtral_dir, tmp_path / "broken")
    expert = "model.language_model.layers.0.block_sparse_moe.experts.1.w2.weight"
    _edit(broken, MODEL, lambda tensors: tensors.pop(expert))
    assert _failed(check_model(broken)) == {"missing tensors": expert}


@pytest.mark.parametrize("adapter", [False, True])
def test_the_command_prints_verdicts_and_exits_with_one_on_failure(
    model_dir: Path, adapter_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], adapter: bool
) -> None:
    """`captune check [--json]`: what a script needs."""
    directory, option = (adapter_dir, "--adapter") if adapter else (model_dir, "--model")
    broken = shutil.copytree(directory, tmp_path / "broken")
    file, name = (WEIGHTS, Q.format("B")) if adapter else (MODEL, PROJ)
    _edit(broken, file, _set(name, torch.zeros_like))
    base = ["--model", str(model_dir)] if adapter else []
    assert cli.main(["check", *base, option, str(directory), "--json"]) == 0
    verdicts = json.loads(capsys.readouterr().out)
    assert all(v["passed"] for v in verdicts) and set(verdicts[0]) == {"name", "passed", "detail"}
    assert cli.main(["check", *base, option, str(broken), "--json"]) == 1
    failed = [v["name"] for v in json.loads(capsys.readouterr().out) if not v["passed"]]
    assert failed == (["effect"] if adapter else ["all-zero"])
    assert cli.main(["check", *base, option, str(broken)]) == 1
    assert f"FAIL  {failed[0]}: " in capsys.readouterr().out
    assert cli.main(["check", *base, option, str(tmp_path / "none")]) == 2
    assert "no such directory" in capsys.readouterr().err


Q = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("verdict", "file", "change"),
    [
        ("empty tensors", WEIGHTS, _set(Q.format("A"), torch.empty(0))),
        ("effect", WEIGHTS, _set(Q.format("B"), torch.zeros_like)),
        ("shapes", WEIGHTS, lambda t: t.update({Q.format("A"): torch.ones(2, 32), Q.format("B"): torch.ones(32, 2)})),
        ("shapes", WEIGHTS, _set(Q.format("A"), torch.ones(4, 99))),
        ("targets", WEIGHTS, lambda tensors: tensors.pop(Q.format("A"))),
        ("targets", WEIGHTS, lambda tensors: [tensors.pop(Q.format(part)) for part in "AB"]),
        ("finite", WEIGHTS, _set(Q.format("A"), lambda t: t / 0)),
        ("files", NON_LORA, _set(PROJ, torch.ones(2, 2))),  # PEFT's file has another
        (
            "trained whole",
            NON_LORA,
            lambda t: t.update({"model.vision_tower.pre_layrnorm.weight": torch.ones(32)}),
        ),
    ],
)
def test_faults_of_adapters_are_found(
    model_dir: Path, adapter_dir: Path, tmp_path: Path, verdict: str, file: str, change: Callable[[Tensors], None]
) -> None:
    """Each planted fault turns its own verdict."""
    broken = shutil.copytree(adapter_dir, tmp_path / "broken")
    _edit(broken, file, change)
    assert verdict in _failed(check_adapter(broken, model_dir))


def test_faults_of_adapter_settings_are_found(model_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    """A leaf name that also hits the CLIP tower, an alpha of zero, a file that is missing."""
    broken = shutil.copytree(adapter_dir, tmp_path / "broken")
    _edit_json(broken, CONFIG, lambda values: values.update(target_modules=["q_proj"], lora_alpha=0))
    failed = _failed(check_adapter(broken, model_dir))
    assert "vision_tower" in failed["targets"]
    broken = shutil.copytree(adapter_dir, tmp_path / "scaled")
    _edit_json(broken, CONFIG, lambda values: values.update(lora_alpha=0))
    assert "scaled by zero" in _failed(check_adapter(broken, model_dir))["effect"]
    (broken / CONFIG).unlink()
    assert "only one is there" in _failed(check_adapter(broken, model_dir))["files"]
