"""An MGM from a language model and two towers: every tensor accounted for, the projector fresh, the rest untouched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from pipelines.adapters.check import check_model
from pipelines.mgm.names import PROJECTOR, TOWERS
from pipelines.mgm.tensorfiles import read_file
from pipelines.modelfiles import weight_files
from ray_jobs import cli
from tests.pipelines.tiny_parts import FAMILIES, language_model, write_towers

from .conftest import chat, noise_image

Tensors = dict[str, torch.Tensor]


def tensors(directory: Path) -> Tensors:
    return {name: tensor for file in weight_files(directory) for name, tensor in read_file(file).items()}


@pytest.fixture(scope="session")
def towers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_towers(tmp_path_factory.mktemp("towers"))


def assemble(language: Path, towers: tuple[Path, Path], output: Path, *more: str) -> int:
    parts = ["--language-model", str(language), "--clip", str(towers[0]), "--openclip", str(towers[1])]
    return cli.main(["assemble", *parts, "--output", str(output), "--image-size-aux", "128", *more])


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_become_a_complete_model_that_answers(family: str, towers: tuple[Path, Path], tmp_path: Path) -> None:
    """Every tensor of the parts is there, in the language model's dtype; the projector has torch's own first values."""
    language = language_model(tmp_path / "language", family)
    assert assemble(language, towers, tmp_path / "mgm") == 0
    found, parts = tensors(tmp_path / "mgm"), tensors(language)
    for name, tensor in parts.items():
        ours = name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name
        assert torch.equal(found[ours], tensor), name
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    fresh = {name for name in found if name.startswith(PROJECTOR)}
    assert len(found) == len(parts) + len(fresh) + sum(name.startswith(TOWERS) for name in found)
    bound = found["model.uni_value.proj.weight"].shape[1] ** -0.5  # nn.Linear's
    assert 0.9 * bound < float(found["model.uni_value.proj.weight"].abs().max()) <= 1.01 * bound
    assert bool((found["model.uni_key.norm.weight"] == 1).all())
    assert [verdict for verdict in check_model(tmp_path / "mgm") if not verdict.passed] == []
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "mgm")
    processor = AutoProcessor.from_pretrained(tmp_path / "mgm")
    inputs = processor.apply_chat_template(
        chat("What does it say?", noise_image(0)),
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]


def test_a_finished_model_gives_everything_but_its_projector(
    converted: Path, towers: tuple[Path, Path], tmp_path: Path
) -> None:
    for seed, name in ((0, "first"), (0, "again"), (1, "other")):
        command = ["assemble", "--from", str(converted), "--output", str(tmp_path / name), "--seed", str(seed)]
        assert cli.main(command) == 0
    before, first, again, other = map(tensors, (converted, *(tmp_path / name for name in ("first", "again", "other"))))
    assert before.keys() == first.keys()
    changed = {name for name in before if not torch.equal(before[name], first[name])}
    assert changed == {name for name in before if name.startswith(PROJECTOR)}
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.uni_query.proj.weight"], other["model.uni_query.proj.weight"])
    saved = json.loads((tmp_path / "first" / "config.json").read_text())
    assert saved == json.loads((converted / "config.json").read_text())


def test_parts_that_do_not_fit_are_refused_and_leave_nothing(
    converted: Path, towers: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    language = language_model(tmp_path / "language", "gemma")
    wrong = {
        "language model of an MGM is one of": lambda: assemble(towers[0], towers, tmp_path / "out"),
        "no CLIP has": lambda: assemble(language, (language, towers[1]), tmp_path / "out"),
        "no ConvNeXt has": lambda: assemble(language, (towers[0], towers[0]), tmp_path / "out"),
        "no such directory": lambda: assemble(language, (tmp_path / "nowhere", towers[1]), tmp_path / "out"),
        "do not make an MGM": lambda: assemble(language, towers, tmp_path / "out", "--image-size-aux", "100"),
        "assemble.clip: stands beside assemble.from_mgm": lambda: cli.main(
            ["assemble", "--from", str(converted), "--clip", str(towers[0]), "--output", str(tmp_path / "out")]
        ),
    }
    state = load_file(language / "model.safetensors")
    for message, command in wrong.items():
        assert command() == 2, message
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists(), message
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, language / "model.safetensors", metadata={"format": "pt"})
    assert assemble(language, towers, tmp_path / "out") == 2
    assert "1 missing: model.layers.1.mlp.up_proj.weight" in capsys.readouterr().err


def test_a_base_is_made_once_and_again_after_a_kill(
    towers: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As any stage: complete, half done, or of other parts."""
    language, output = language_model(tmp_path / "language", "gemma"), tmp_path / "mgm"
    assert assemble(language, towers, output) == 0
    made = tensors(output)
    manifest = json.loads((output / "MANIFEST.json").read_text())
    assert (manifest["language_model"], manifest["tokens_per_image"]) == ("gemma", 16)
    written = (output / "model.safetensors").stat().st_mtime_ns
    assert assemble(language, towers, output) == 0
    assert (output / "model.safetensors").stat().st_mtime_ns == written
    # A kill while files were moved: some are there, some not, and no manifest.
    (output / "MANIFEST.json").unlink()
    (output / "_work").mkdir()
    (output / "tokenizer.json").rename(output / "_work" / "tokenizer.json")
    assert assemble(language, towers, output) == 0
    again = tensors(output)
    assert again.keys() == made.keys() and all(torch.equal(again[name], tensor) for name, tensor in made.items())
    assert (output / "tokenizer.json").is_file() and not (output / "_work").exists()
    assert assemble(language, towers, output, "--seed", "1") == 2
    assert "what changed: config.seed" in capsys.readouterr().err
