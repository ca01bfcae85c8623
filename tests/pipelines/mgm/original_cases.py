"""Reference cases beyond the recorded checkpoint: variants of it, and the prompts that are put to them.

`record_original.py` runs the original code on these once and writes `data/cases.safetensors`; `test_reference.py` runs
ours. The variants are made from the one checkpoint in `data/`, so that each costs a few tensors and no second model.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

DATA = Path(__file__).parent / "data"
CHECKPOINT = DATA / "mgm_gemma" / "checkpoint"
PLACEHOLDER = -200  # one image in the original's input_ids
NEW_TOKENS = 6

# Two images in a row, one, none (for which the original wants a dummy image), and lengths that differ.
ROWS = [
    [2, 32, PLACEHOLDER, 80, 25, PLACEHOLDER, 31, 49, 11, 37],
    [2, PLACEHOLDER, 44, 22, 88, 19],
    [2, 6, 8, 65, 36, 14, 85],
]
PROMPT = 4  # labels of so many tokens of each row are masked


@dataclass(frozen=True)
class Case:
    """One variant: changes to the original `config.json`, and the language model it has."""

    name: str
    config: dict[str, Any]
    text: str = "gemma"


CASES = [
    Case("several", {}),
    Case("hd", {"image_grid": 2}),
    Case("hd_global", {"image_grid": 2, "image_global": True}),
    Case("llama", {"model_type": "mgm", "tie_word_embeddings": False, "rope_theta": 5000.0}, "llama"),
    Case(
        "mixtral",
        {"model_type": "mgm_mixtral", "tie_word_embeddings": False, "num_local_experts": 3, "sliding_window": None},
        "mixtral",
    ),
]


def write_checkpoint(case: Case, directory: Path) -> Path:
    """The variant as an original checkpoint, its CLIP directory beside it."""
    checkpoint = directory / "checkpoint"
    checkpoint.mkdir(parents=True)
    shutil.copytree(DATA / "openai-clip-tiny", directory / "openai-clip-tiny")
    config = json.loads((CHECKPOINT / "config.json").read_text()) | case.config
    if case.text != "gemma":
        config = {key: value for key, value in config.items() if key not in ("head_dim", "hidden_activation")}
        config |= {"hidden_act": "silu", "rms_norm_eps": 1e-5}
    (checkpoint / "config.json").write_text(json.dumps(config))
    tensors = load_file(CHECKPOINT / "model.safetensors")
    save_file(tensors if case.text == "gemma" else _as_llama(tensors, case.text), checkpoint / "model.safetensors")
    return checkpoint


def _as_llama(tensors: dict[str, torch.Tensor], text: str) -> dict[str, torch.Tensor]:
    """Gemma's tensors in a Llama's or a Mixtral's places: norms around one, a head of its own, experts that differ."""
    changed: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.partition(".mlp.")
        if name.startswith("model.layers.") and name.endswith("norm.weight") or name == "model.norm.weight":
            changed[name] = tensor + 1
        elif name.startswith("model.layers.") and part and text == "mixtral":
            w = {"gate_proj.weight": "w1", "down_proj.weight": "w2", "up_proj.weight": "w3"}[part]
            for expert in range(3):
                changed[f"{layer}.block_sparse_moe.experts.{expert}.{w}.weight"] = tensor.roll(expert, 0) * (expert + 1)
            changed[f"{layer}.block_sparse_moe.gate.weight"] = tensors[f"{layer}.self_attn.q_proj.weight"][:3].clone()
        else:
            changed[name] = tensor
    changed["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0, 1).contiguous()
    return changed


def padded(rows: list[list[int]], value: int = 0) -> torch.Tensor:
    """(rows, longest), padded on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def labels_of(rows: list[list[int]]) -> list[list[int]]:
    """The rows as labels: their first tokens and every image without loss."""
    return [[-100] * PROMPT + [-100 if t == PLACEHOLDER else t for t in row[PROMPT:]] for row in rows]
