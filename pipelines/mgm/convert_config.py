"""The configuration side of conversion: the original's flat `config.json` to `MGMConfig` and back, and what tensors it
implies.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from pipelines.errors import UserError
from pipelines.mgm.configuration import MGMConfig
from pipelines.mgm.names import CLIP, CONVNEXT, HEAD
from pipelines.mgm.skeleton import skeleton
from pipelines.modelfiles import Shapes, read_object

# The original's model types (and those from before it was renamed) and the language models behind them.
TEXT_TYPES = {
    "mgm_gemma": "gemma",
    "mgm": "llama",
    "mgm_mistral": "mistral",
    "mgm_mixtral": "mixtral",
    "mini_gemini_gemma": "gemma",
    "mini_gemini": "llama",
    "mini_gemini_mixtral": "mixtral",
}
_CLASSES = {"gemma": "MGMGemma", "llama": "MGMLlama", "mistral": "MGMMistral", "mixtral": "MGMMixtral"}


def text_type_of(original: dict[str, Any], where: Path) -> str:
    """The language model's type behind an original configuration read from `where`."""
    text_type = TEXT_TYPES.get(original.get("model_type", ""))
    if text_type is None or "mm_vision_tower" not in original:
        raise UserError(
            f"{where}: not an original MGM checkpoint (model_type {original.get('model_type')!r}, "
            f"architectures {original.get('architectures')}): MGM has model_type {', '.join(TEXT_TYPES)} and "
            f"mm_vision_tower"
        )
    if "mm_vision_tower_aux" not in original:
        raise UserError(f"{where}: has no mm_vision_tower_aux, so no patch info mining: a LLaVA checkpoint, not MGM")
    return text_type


def is_tied(original: dict[str, Any], text_type: str) -> bool:
    """Whether input and output embeddings are one tensor."""
    return bool(original.get("tie_word_embeddings", CONFIG_MAPPING[text_type]().tie_word_embeddings))


def build_config(
    original: dict[str, Any], text_type: str, shapes: Shapes, clip_dir: Path | None, dtype: torch.dtype | None
) -> MGMConfig:
    """Our configuration from the original's, the converted tensors' shapes and the CLIP directory."""
    text = build_text_config(original, text_type)
    try:
        return MGMConfig(
            text_config=text,
            vision_config=clip_config(shapes, clip_dir),
            vision_config_aux=convnext_config(shapes),
            # Outside of the vocabulary unless the tokenizer says otherwise: no embedding has to be made up for it.
            image_token_id=text["vocab_size"],
            mm_projector_type=original.get("mm_projector_type", "linear"),
            vision_select_layer=original.get("mm_vision_select_layer", -1),
            vision_select_feature=original.get("mm_vision_select_feature", "patch"),
            image_size_aux=original.get("image_size_aux", 320),
            image_grid=original.get("image_grid", 1),
            image_global=bool(original.get("image_global", False)),
            dtype=dtype,
        )
    except ValueError as error:
        raise UserError(f"the checkpoint's configuration is impossible: {error}") from error


def build_text_config(original: dict[str, Any], text_type: str) -> dict[str, Any]:
    """The language model's part of an original configuration, as its `PreTrainedConfig` understands it."""
    known = {field.name for field in dataclasses.fields(CONFIG_MAPPING[text_type])} | {"rope_theta", "rope_scaling"}
    general = {"architectures", "transformers_version", "id2label", "label2id", "problem_type", "dtype", "return_dict"}
    text = {key: value for key, value in original.items() if key in known - general and value is not None}
    text["model_type"] = text_type
    text["tie_word_embeddings"] = is_tied(original, text_type)
    if text_type == "gemma":
        # transformers 4.39+ read `hidden_activation` and took the tanh approximation when it was null, whatever
        # `hidden_act` said. GemmaConfig now rewrites "gelu"; "gelu_python" is the exact function under another name.
        activation = original.get("hidden_activation") or "gelu_pytorch_tanh"
        text["hidden_act"] = "gelu_python" if activation == "gelu" else activation
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = text.get(key)
        if isinstance(value, int) and not 0 <= value < text["vocab_size"]:
            del text[key]
    return text


def clip_config(shapes: Shapes, clip_dir: Path | None) -> dict[str, Any]:
    """From the CLIP directory; without one, from the tensors if they are shaped like an OpenAI CLIP."""
    if clip_dir is not None:
        config = read_object(clip_dir / "config.json")
        config = config.get("vision_config", config)
        return {key: value for key, value in config.items() if key not in ("architectures", "dtype", "torch_dtype")}
    embeddings = CLIP + "embeddings."
    width, _, patch, _ = shapes[embeddings + "patch_embedding.weight"]
    if width % 64:
        raise UserError(
            f"CLIP tower of width {width}: its number of attention heads is not in the tensors; give its "
            f"directory as --clip"
        )
    layers = CLIP + "encoder.layers."
    return {
        "hidden_size": width,
        "intermediate_size": shapes[layers + "0.mlp.fc1.weight"][0],
        "num_hidden_layers": _count(shapes, layers),
        "num_attention_heads": width // 64,  # as in every CLIP that OpenAI published
        "hidden_act": "quick_gelu",
        "patch_size": patch,
        "image_size": patch * round((shapes[embeddings + "position_embedding.weight"][0] - 1) ** 0.5),
    }


def convnext_config(shapes: Shapes) -> dict[str, Any]:
    """From the tensors: everything about a ConvNeXt trunk is in their shapes, except the norms' epsilon."""
    stages = CONVNEXT + "encoder.stages."
    count = _count(shapes, stages)
    widths = [shapes[f"{stages}{stage}.layers.0.dwconv.weight"][0] for stage in range(count)]
    return {
        "hidden_sizes": widths,
        "depths": [_count(shapes, f"{stages}{stage}.layers.") for stage in range(count)],
        "num_stages": count,
        "patch_size": shapes[CONVNEXT + "embeddings.patch_embeddings.weight"][-1],
        # timm: 1e-6, but convnext_xxlarge (the only one this wide) has 1e-5
        "layer_norm_eps": 1e-5 if widths[0] == 384 else 1e-6,
    }


def _count(shapes: Shapes, prefix: str) -> int:
    """How many modules are numbered after `prefix`."""
    return len({name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)})


def expected_shapes(config: MGMConfig) -> Shapes:
    """Names and shapes of a saved model of this configuration, as `save_pretrained` writes it."""
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton(config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes[HEAD]
    return dict(pair for name, shape in shapes.items() for pair in in_files(name, shape))


def in_files(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes that a tensor of the model has in files: its own, but Mixtral's experts are one tensor in memory
    and one per expert in files, whose rows follow each other in this order.
    """
    if match := re.fullmatch(r"(.*\.)mlp\.(gate\.weight|experts\.(?:gate_up|down)_proj)", name):
        layer, part = match.groups()
        moe = layer + "block_sparse_moe."
        if part == "gate.weight":
            return [(moe + part, shape)]
        count, rows, columns = shape
        if part == "experts.down_proj":
            return [(f"{moe}experts.{expert}.w2.weight", (rows, columns)) for expert in range(count)]
        return [
            (f"{moe}experts.{expert}.{w}.weight", (rows // 2, columns)) for expert in range(count) for w in ("w1", "w3")
        ]
    return [(name, shape)]


def original_config(config: MGMConfig) -> dict[str, Any]:
    """The original's flat `config.json` for a configuration of ours."""
    text = config.text_config
    if text.model_type not in _CLASSES:
        raise UserError(f"text_config.model_type {text.model_type!r} does not exist in the original code")
    known = config.original_config
    if known is None:
        kept = {key: value for key, value in text.to_dict().items() if key != "rope_parameters"}
        known = kept | {
            "model_type": next(theirs for theirs, ours in TEXT_TYPES.items() if ours == text.model_type),
            "architectures": [f"{_CLASSES[text.model_type]}ForCausalLM"],
            "rope_theta": (text.rope_parameters or {}).get("rope_theta", 10000.0),
            "mm_vision_tower": "model_zoo/OpenAI/clip-vit-large-patch14-336",
            "mm_vision_tower_aux": "model_zoo/OpenAI/openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup",
            "image_aspect_ratio": "pad",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
        }
    current = {
        "vocab_size": text.vocab_size,
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_hidden_size_aux": sum(config.vision_config_aux.hidden_sizes),
        "mm_projector_type": config.mm_projector_type,
        "mm_vision_select_layer": config.vision_select_layer,
        "mm_vision_select_feature": config.vision_select_feature,
        "image_size_aux": config.image_size_aux,
        "image_grid": config.image_grid,
        "image_global": config.image_global,
    }
    if is_tied(known, text.model_type) != config.tie_word_embeddings:  # the head came untied, or was tied, since
        current["tie_word_embeddings"] = config.tie_word_embeddings
    return {key: value for key, value in (known | current).items() if not key.startswith("_")}
