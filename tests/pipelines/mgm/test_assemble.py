"""An MGM from a language model and two towers: every tensor accounted for, the projector fresh, the rest untouched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from pipelines.adapters.check import check_model
from pipelines.mgm.names import PROJECTOR, TOWERS
from pipelines.mgm.tensorfiles import read_file
from pipelines.modelfiles import weight_files
from ray_jobs import cli
from tests.tiny_tokenizers import byte_level, sentencepiece_like

from .conftest import chat, noise_image

Tensors = dict[str, torch.Tensor]
# As published: without <image>.
FAMILIES = {
    "gemma": lambda: byte_level("<bos>", "<eos>", "<pad>", ["<start_of_turn>", "<end_of_turn>"]),
    "llama": lambda: sentencepiece_like("<s>", False, []),
    "mixtral": lambda: sentencepiece_like("<s>", True, []),
}


def tensors(directory: Path) -> Tensors:
    return {name: tensor for file in weight_files(directory) for name, tensor in read_file(file).items()}


@pytest.fixture(scope="session")
def towers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A CLIP directory and an OpenCLIP one in their published layouts, from the reference checkpoint's towers."""
    root, data = tmp_path_factory.mktemp("towers"), Path(__file__).parent / "data"
    state = load_file(data / "mgm_gemma" / "checkpoint" / "model.safetensors")
    clip, openclip = root / "clip", root / "openclip"
    clip.mkdir()
    openclip.mkdir()
    for file in (data / "openai-clip-tiny").iterdir():
        (clip / file.name).write_bytes(file.read_bytes())
    prefix, aux = "model.vision_tower.vision_tower.", "model.vision_tower_aux.vision_"
    image = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    save_file(image | {"text_model.final_layer_norm.weight": torch.ones(3)}, clip / "model.safetensors")
    trunk = {f"visual.trunk.{name.removeprefix(aux)}": tensor for name, tensor in state.items() if name.startswith(aux)}
    torch.save(trunk | {"logit_scale": torch.ones(())}, openclip / "open_clip_pytorch_model.bin")
    return clip, openclip


def language_model(directory: Path, family: str, **changes: Any) -> Path:
    tokenizer = FAMILIES[family]()
    config = CONFIG_MAPPING[family](
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **changes,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


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
        "leave --clip out": lambda: cli.main(
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
