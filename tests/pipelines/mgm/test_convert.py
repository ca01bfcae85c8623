"""Original checkpoint <-> Hugging Face directory: exact, strict, in every layout that the original has."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GemmaConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from pipelines.errors import UserError
from pipelines.mgm.convert import convert_checkpoint, export_original
from pipelines.mgm.modeling import MGMForConditionalGeneration
from pipelines.mgm.names import from_openclip, to_hf, to_original
from pipelines.mgm.parts import TOKENIZER_FILES
from pipelines.mgm.processing import MGMProcessor
from pipelines.mgm.tensorfiles import read_file
from pipelines.modelfiles import weight_files
from ray_jobs import cli
from tests.tiny_tokenizers import CORPUS, tokenizer_for

from .conftest import chat, noise_image

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def checkpoint(data: Path, tmp_path: Path) -> Path:
    """A writable copy of the reference checkpoint, with the CLIP configuration where its config.json points."""
    shutil.copytree(data / "mgm_gemma" / "checkpoint", tmp_path / "checkpoint")
    shutil.copytree(data / "openai-clip-tiny", tmp_path / "openai-clip-tiny")
    return tmp_path / "checkpoint"


def tensors(directory: Path) -> Tensors:
    return {name: tensor for file in weight_files(directory) for name, tensor in read_file(file).items()}


def same(first: Tensors, second: Tensors) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


def rewrite(checkpoint: Path, change: Callable[[Tensors], Any]) -> Tensors:
    state = load_file(checkpoint / "model.safetensors")
    change(state)
    save_file(state, checkpoint / "model.safetensors")
    return state


def convert_fails(checkpoint: Path, message: str, **kwargs: Any) -> None:
    output = checkpoint.parent / "output"
    with pytest.raises(UserError, match=message):
        convert_checkpoint(checkpoint, output, **kwargs)
    assert not output.exists()  # nothing half-converted is left


def test_round_trip_is_exact(checkpoint: Path, tmp_path: Path) -> None:
    convert_checkpoint(checkpoint, tmp_path / "hf")
    export_original(tmp_path / "hf", tmp_path / "back")
    same(tensors(checkpoint), tensors(tmp_path / "back"))
    assert json.loads((checkpoint / "config.json").read_text()) == json.loads(
        (tmp_path / "back/config.json").read_text()
    )
    assert (tmp_path / "back/model.safetensors.index.json").exists()  # the original cannot load without one


def test_round_trip_survives_saving_by_transformers(checkpoint: Path, tmp_path: Path) -> None:
    """Training and merging write the directory anew; the way back must still be there."""
    convert_checkpoint(checkpoint, tmp_path / "hf")
    AutoModelForImageTextToText.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "again")
    export_original(tmp_path / "again", tmp_path / "back")
    same(tensors(checkpoint), tensors(tmp_path / "back"))


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_sharded_checkpoints(checkpoint: Path, tmp_path: Path, form: str) -> None:
    state = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    stem, suffix = ("model", ".safetensors") if form == "safetensors" else ("pytorch_model", ".bin")
    weight_map = {}
    for shard in range(3):
        part = {name: tensor for index, (name, tensor) in enumerate(state.items()) if index % 3 == shard}
        file = checkpoint / f"{stem}-{shard}{suffix}"
        save_file(part, file) if form == "safetensors" else torch.save(part, file)
        weight_map |= dict.fromkeys(part, file.name)
    (checkpoint / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert_checkpoint(checkpoint, tmp_path / "hf")
    export_original(tmp_path / "hf", tmp_path / "back")
    same(state, tensors(tmp_path / "back"))

    (checkpoint / f"{stem}-1{suffix}").unlink()
    convert_fails(checkpoint, "names files that are not there")


def test_towers_in_their_own_directories(checkpoint: Path, tmp_path: Path, converted: Path) -> None:
    """CLIP as transformers saves it (with its text half), ConvNeXt as OpenCLIP does (`open_clip_pytorch_model.bin`)."""
    state = load_file(checkpoint / "model.safetensors")
    inside = {name: tensor for name, tensor in state.items() if ".vision_tower" not in name}
    save_file(inside, checkpoint / "model.safetensors")
    prefix, aux = "model.vision_tower.vision_tower.", "model.vision_tower_aux.vision_"
    clip = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    clip |= {"text_model.final_layer_norm.weight": torch.ones(3), "logit_scale": torch.ones(())}
    clip["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    trunk = {f"visual.trunk.{name.removeprefix(aux)}": tensor for name, tensor in state.items() if name.startswith(aux)}
    trunk |= {"visual.trunk.head.norm.weight": torch.ones(3), "visual.head.proj.weight": torch.ones(3)}
    trunk |= {"text.token_embedding.weight": torch.ones(3), "logit_scale": torch.ones(())}
    openclip = tmp_path / "convnext"
    openclip.mkdir()
    save_file(clip, tmp_path / "openai-clip-tiny" / "model.safetensors")
    torch.save(trunk, openclip / "open_clip_pytorch_model.bin")

    convert_checkpoint(checkpoint, tmp_path / "hf", openclip=openclip)
    same(tensors(tmp_path / "hf"), tensors(converted))
    export_original(tmp_path / "hf", tmp_path / "back")
    same(inside, tensors(tmp_path / "back"))  # as it came
    export_original(tmp_path / "hf", tmp_path / "whole", towers=True)
    same(state, tensors(tmp_path / "whole"))

    torch.save(
        trunk | {"visual.trunk.stages.9.what": torch.ones(1), "huh": torch.ones(1)},
        openclip / "open_clip_pytorch_model.bin",
    )
    convert_fails(checkpoint, "no ConvNeXt has: huh", openclip=openclip)
    convert_fails(checkpoint, "no ConvNeXt tensors: give that tower's directory as --openclip")
    convert_fails(checkpoint, "no such directory", openclip=tmp_path / "nowhere")


def test_buffers_and_tied_head_of_older_files_come_back(checkpoint: Path, tmp_path: Path) -> None:
    def add(state: Tensors) -> None:
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(6)
        state["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]

    state = rewrite(checkpoint, add)
    convert_checkpoint(checkpoint, tmp_path / "hf")
    export_original(tmp_path / "hf", tmp_path / "back")
    same(state, tensors(tmp_path / "back"))
    rewrite(checkpoint, lambda state: state["lm_head.weight"].add_(1))
    convert_fails(checkpoint, "lm_head.weight differs")


def test_unaccounted_missing_and_misshapen_tensors_are_listed(checkpoint: Path) -> None:
    state = rewrite(
        checkpoint, lambda state: state.update({"model.surprise.weight": torch.ones(1), "x": torch.ones(1)})
    )
    convert_fails(checkpoint, "2 tensors that no MGM has: model.surprise.weight, x")
    rewrite(
        checkpoint, lambda state: [state.pop("model.surprise.weight"), state.pop("x"), state.pop("model.norm.weight")]
    )
    convert_fails(checkpoint, "1 missing: model.norm.weight")
    rewrite(checkpoint, lambda state: state.update({"model.norm.weight": torch.ones(5)}))
    convert_fails(checkpoint, r"1 of another shape: model.norm.weight is \(5,\), the configuration says \(48,\)")
    extra = {"model.norm.weight": torch.ones(48), "model.layers.7.mlp.up_proj.weight": torch.ones(1)}
    rewrite(checkpoint, lambda state: state.update(extra))
    convert_fails(checkpoint, "1 not part of the configured model: model.layers.7")
    assert state


def test_other_architectures_are_refused(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    for change, message in [
        ({"model_type": "llava_llama"}, "not an original MGM checkpoint"),
        ({"model_type": "gemma"}, "not an original MGM checkpoint"),
        ({"mm_vision_tower_aux": None}, "LLaVA checkpoint"),
        ({"mm_projector_type": "resampler"}, "configuration is impossible"),
    ]:
        changed = {key: value for key, value in (config | change).items() if value is not None}
        (checkpoint / "config.json").write_text(json.dumps(changed))
        convert_fails(checkpoint, message)
    (checkpoint / "config.json").write_text("{")
    convert_fails(checkpoint, "not JSON")
    (checkpoint / "config.json").unlink()
    convert_fails(checkpoint, "no such file")


def test_unreadable_files_are_named(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500_000])
    convert_fails(checkpoint, "model.safetensors: not a readable safetensors file, truncated")
    file.unlink()
    convert_fails(checkpoint, "no weights there")
    pickled = checkpoint / "pytorch_model.bin"
    for content, message in [
        ([torch.ones(1)], "pickled list, not a state dict"),
        ({"model.norm.weight": "text"}, "not tensors: model.norm.weight"),
        (Path("/tmp"), "not a readable state dict"),  # needs a class that weights_only refuses
    ]:
        torch.save(content, pickled)
        convert_fails(checkpoint, message)
    pickled.write_bytes(b"not a pickle")
    convert_fails(checkpoint, "not a readable state dict")


def test_output_directory_must_be_new(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(UserError, match="not an empty directory"):
        convert_checkpoint(checkpoint, tmp_path / "taken")
    assert (tmp_path / "taken" / "file").read_text() == "mine"
    with pytest.raises(UserError, match="not a Hugging Face MGM directory"):
        export_original(checkpoint, tmp_path / "back")


def small(kind: type[PreTrainedConfig], **kwargs: Any) -> PreTrainedConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return kind(vocab_size=400, num_key_value_heads=1, pad_token_id=0, **sizes, **kwargs)


@pytest.mark.parametrize(
    ("text", "template"),
    [
        (None, "gemma"),
        (small(LlamaConfig), "vicuna_v1"),
        (small(LlamaConfig), "llama_3"),
        (small(LlamaConfig), "chatml_direct"),
        (small(MixtralConfig, num_local_experts=2), "mistral_instruct"),
    ],
    ids=["gemma", "vicuna", "llama3", "yi", "mixtral"],
)
def test_every_language_model_goes_there_and_back(
    make_model: Callable[..., MGMForConditionalGeneration], tmp_path: Path, text: PreTrainedConfig, template: str
) -> None:
    """HF -> original -> HF, with tokenizer: same tensors, same answer, the right chat template; HD and bfloat16."""
    tokenizer: PreTrainedTokenizerFast = tokenizer_for(template)
    image = tokenizer.convert_tokens_to_ids("<image>")
    model = make_model(text_config=text, image_grid=2, image_global=True, image_size_aux=128, image_token_id=image)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    MGMProcessor.from_config(model.config, tokenizer, template).save_pretrained(tmp_path / "hf")
    model.config.vision_config.save_pretrained(tmp_path / "openai-clip")
    export_original(tmp_path / "hf", tmp_path / "original")
    convert_checkpoint(tmp_path / "original", tmp_path / "again", clip=tmp_path / "openai-clip")
    same(tensors(tmp_path / "hf"), tensors(tmp_path / "again"))

    again, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "again", dtype="auto", output_loading_info=True
    )
    assert not any(info.values()) and again.dtype == torch.bfloat16
    # Loaded, not `model` itself: `model.to(bfloat16)` also rounded the rotary frequencies, which are never saved.
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf", dtype="auto").eval()
    first, second = (AutoProcessor.from_pretrained(tmp_path / name) for name in ("hf", "again"))
    messages = chat("What is it?", noise_image(0))
    kwargs = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    expected, actual = (each.apply_chat_template(messages, **kwargs) for each in (first, second))
    assert torch.equal(expected["input_ids"], actual["input_ids"])
    with torch.no_grad():
        assert torch.equal(model(**expected).logits, again.eval()(**actual).logits)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("text", [GemmaConfig, LlamaConfig], ids=["gemma", "llama"])
def test_heads_go_there_and_back(
    make_model: Callable[..., MGMForConditionalGeneration], tmp_path: Path, text: type[PreTrainedConfig], tie: bool
) -> None:
    """Whatever the family's habit: a tied head stays tied, another keeps its weights; and a second time, too."""
    model = make_model(text_config=small(text, tie_word_embeddings=tie, head_dim=16), tie_word_embeddings=tie)
    model.save_pretrained(tmp_path / "hf-0")
    model.config.vision_config.save_pretrained(tmp_path / "openai-clip")
    for turn in range(2):
        export_original(tmp_path / f"hf-{turn}", tmp_path / f"original-{turn}")
        convert_checkpoint(tmp_path / f"original-{turn}", tmp_path / f"hf-{turn + 1}", clip=tmp_path / "openai-clip")
        same(tensors(tmp_path / "hf-0"), tensors(tmp_path / f"hf-{turn + 1}"))
    assert ("lm_head.weight" in tensors(tmp_path / "hf-2")) != tie
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf-2")
    assert again.config.tie_word_embeddings == tie
    embedding = again.get_input_embeddings().weight
    assert (again.lm_head.weight.data_ptr() == embedding.data_ptr()) == tie
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_a_head_that_came_untied_since_is_exported(checkpoint: Path, tmp_path: Path) -> None:
    """The configuration that the checkpoint came with says "tied"; the model has another head by now."""
    convert_checkpoint(checkpoint, tmp_path / "hf")
    state = tensors(tmp_path / "hf")
    state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"] + 1
    save_file(state, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    export_original(tmp_path / "hf", tmp_path / "back")
    convert_checkpoint(tmp_path / "back", tmp_path / "again", clip=tmp_path / "openai-clip-tiny")
    same(state, tensors(tmp_path / "again"))


@pytest.mark.parametrize("kind", ["linear", "identity", "mlp1x_gelu", "mlp3x_gelu"])
def test_every_projector_goes_there_and_back(
    make_model: Callable[..., MGMForConditionalGeneration], tmp_path: Path, kind: str
) -> None:
    model = make_model(mm_projector_type=kind)
    model.save_pretrained(tmp_path / "hf")
    model.config.vision_config.save_pretrained(tmp_path / "openai-clip")
    export_original(tmp_path / "hf", tmp_path / "original")
    names = {name for name in tensors(tmp_path / "original") if ".mm_projector." in name}
    places = {"linear": [""], "identity": [], "mlp1x_gelu": ["0."], "mlp3x_gelu": ["0.", "2.", "4."]}[kind]
    assert names == {f"model.mm_projector.{place}{part}" for place in places for part in ("weight", "bias")}
    convert_checkpoint(tmp_path / "original", tmp_path / "again", clip=tmp_path / "openai-clip")
    same(tensors(tmp_path / "hf"), tensors(tmp_path / "again"))


def test_a_sentencepiece_model_is_tokenizer_enough(checkpoint: Path, tmp_path: Path) -> None:
    """Published checkpoints may hold a `tokenizer.model` and nothing made of it."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=100, model_type="bpe", minloglevel=2,
        add_dummy_prefix=False,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
        control_symbols=["<start_of_turn>", "<end_of_turn>"],
    )  # fmt: skip
    for name in TOKENIZER_FILES:
        (checkpoint / name).unlink(missing_ok=True)
    (checkpoint / "tokenizer.model").write_bytes(model.getvalue())
    settings = {"tokenizer_class": "GemmaTokenizer", "pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
    convert_checkpoint(checkpoint, tmp_path / "hf")
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "hf").tokenizer
    said = "What is written on the sign?"
    assert tokenizer.decode(tokenizer(said)["input_ids"], skip_special_tokens=True).strip() == said
    reader = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert [token for token in tokenizer(said)["input_ids"] if token != 2] == reader.encode(said)


def test_the_commands(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There and back from the shell; another architecture ends with status 2 and the file's name."""
    hf, back, alone = (str(tmp_path / name) for name in ("hf", "back", "alone"))
    assert cli.main(["convert", "--checkpoint", str(checkpoint), "--output", hf, "--remote-code"]) == 0
    assert "16 tokens an image" in capsys.readouterr().err
    assert "auto_map" in json.loads((tmp_path / "hf" / "config.json").read_text())
    assert cli.main(["export-original", "--model", hf, "--output", back]) == 0
    same(tensors(checkpoint), tensors(tmp_path / "back"))
    assert cli.main(["export-original", "--model", hf, "--output", alone, "--towers", "false"]) == 0
    assert not any("vision_tower" in name for name in tensors(tmp_path / "alone"))
    assert cli.main(["convert", "--checkpoint", hf, "--output", str(tmp_path / "no")]) == 2
    assert f"{hf}/config.json: not an original MGM checkpoint" in capsys.readouterr().err


def test_names_undo_each_other(converted: Path, data: Path) -> None:
    for name in tensors(data / "mgm_gemma" / "checkpoint"):
        assert to_original(to_hf(name) or "") == name
    assert to_hf("model.vision_resampler.weight") is None and from_openclip("visual.trunk.what") is None
