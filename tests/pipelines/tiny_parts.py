"""What an MGM is assembled of, small: a language model, a CLIP and an OpenCLIP ConvNeXt, laid out as published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.tiny_tokenizers import byte_level, sentencepiece_like

# As published: without <image>.
FAMILIES = {
    "gemma": lambda: byte_level("<bos>", "<eos>", "<pad>", ["<start_of_turn>", "<end_of_turn>"]),
    "llama": lambda: sentencepiece_like("<s>", False, []),
    "mixtral": lambda: sentencepiece_like("<s>", True, []),
}


def write_towers(root: Path) -> tuple[Path, Path]:
    """A CLIP directory and an OpenCLIP one in their published layouts, from the reference checkpoint's towers."""
    data = Path(__file__).parent / "mgm" / "data"
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


def text_sizes(tokenizer: Any) -> dict[str, Any]:
    """The configuration of a small language model of any family, with the special tokens of its tokenizer."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def language_model(directory: Path, family: str, **changes: Any) -> Path:
    """A random language model of a family, in bfloat16, with a tokenizer of that family's kind."""
    tokenizer = FAMILIES[family]()
    config = CONFIG_MAPPING[family](**text_sizes(tokenizer), **changes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
