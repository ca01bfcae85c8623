"""What a tensor is called in an original MGM checkpoint, in CLIP and OpenCLIP directories, and here.

The maps are one to one (`to_hf` and `to_original` undo each other) and never touch a value.
"""

from __future__ import annotations

import re

# What the names of a part's tensors begin with, here.
CLIP, CONVNEXT = "model.vision_tower.", "model.vision_tower_aux."
TOWERS = (CLIP, CONVNEXT)
MINING = ("model.uni_query.", "model.uni_key.", "model.uni_value.")
PROJECTOR = ("model.multi_modal_projector.", *MINING)
"""What alignment trains; the multi-modal projector itself may be the identity, without tensors."""
LANGUAGE_MODEL = "model.language_model."
EMBEDDING, HEAD = LANGUAGE_MODEL + "embed_tokens.weight", "lm_head.weight"
WITHOUT_EFFECT = ("model.uni_key.norm.bias", "model.uni_key.proj.bias")
"""They add one constant to all scores of a token, which softmax ignores: their gradient is zero, and folded mining
skips them."""

# (original, ours), tried in this order; each is a prefix. The rest of the name stays, except in the ConvNeXt.
_PREFIXES = [
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
    ("model.mm_projector.", "model.multi_modal_projector."),
    ("model.vlm_uni_query_projector.0.", "model.uni_query.norm."),
    ("model.vlm_uni_query_projector.1.", "model.uni_query.proj."),
    ("model.vlm_uni_aux_projector.0.", "model.uni_key.norm."),
    ("model.vlm_uni_aux_projector.1.", "model.uni_key.proj."),
    ("model.vlm_uni_val_projector.0.", "model.uni_value.norm."),
    ("model.vlm_uni_val_projector.1.", "model.uni_value.proj."),
    ("model.vision_tower_aux.vision_stem.0.", "model.vision_tower_aux.embeddings.patch_embeddings."),
    ("model.vision_tower_aux.vision_stem.1.", "model.vision_tower_aux.embeddings.layernorm."),
    ("model.vision_tower_aux.vision_stages.", "model.vision_tower_aux.encoder.stages."),
    ("model.embed_tokens.", "model.language_model.embed_tokens."),
    ("model.layers.", "model.language_model.layers."),
    ("model.norm.", "model.language_model.norm."),
    ("lm_head.", "lm_head."),
]
# Inside a ConvNeXt stage: timm's names and transformers'.
_CONVNEXT = [
    (".blocks.", ".layers."),
    (".downsample.", ".downsampling_layer."),
    (".conv_dw.", ".dwconv."),
    (".mlp.fc1.", ".pwconv1."),
    (".mlp.fc2.", ".pwconv2."),
    (".norm.", ".layernorm."),
    (".gamma", ".layer_scale_parameter"),
]

# Buffers that old transformers saved and that follow from the configuration.
_BUFFERS = re.compile(r"\.rotary_emb\.inv_freq$|\.embeddings\.position_ids$")
# Of a whole CLIP or OpenCLIP model: everything that is not the trunk of its image tower.
_CLIP_REST = re.compile(r"^(text_model\.|text_projection|visual_projection|logit_scale)")
_OPENCLIP_REST = re.compile(
    r"^(visual\.head\.|visual\.trunk\.(head|norm_pre)\.|text\.|transformer\.|token_embedding\.|positional_embedding$"
    r"|ln_final\.|text_projection|logit_scale$|logit_bias$|attn_mask$)"
)


def to_hf(name: str) -> str | None:
    """The name here of an original tensor; None for a name that no MGM has."""
    for original, ours in _PREFIXES:
        if name.startswith(original):
            name = ours + name.removeprefix(original)
            if ours == "model.vision_tower_aux.encoder.stages.":
                for timm, hf in _CONVNEXT:
                    name = name.replace(timm, hf)
            return name
    return None


def to_original(name: str) -> str | None:
    """The original name of a tensor of a saved `MGMForConditionalGeneration`; None for a name that it never has."""
    for original, ours in _PREFIXES:
        if name.startswith(ours):
            name = original + name.removeprefix(ours)
            if ours == "model.vision_tower_aux.encoder.stages.":
                for timm, hf in _CONVNEXT:
                    name = name.replace(hf, timm)
            return name
    return None


def is_buffer(name: str) -> bool:
    """Whether an original tensor is a buffer that follows from the configuration."""
    return _BUFFERS.search(name) is not None


def is_tower(name: str) -> bool:
    """Whether an original name belongs to CLIP or ConvNeXt."""
    return name.startswith(("model.vision_tower.", "model.vision_tower_aux."))


def from_clip(name: str) -> str | None:
    """A name in a CLIP directory (vision model or whole model) -> here; "" for what MGM does not use, None if
    unknown.
    """
    if name.startswith("vision_model."):
        return "" if is_buffer(name) else CLIP + name.removeprefix("vision_model.")
    return "" if _CLIP_REST.match(name) else None


def from_openclip(name: str) -> str | None:
    """A name in an OpenCLIP ConvNeXt checkpoint -> here; "" for what MGM does not use, None if unknown."""
    for theirs, original in (("visual.trunk.stem.", "vision_stem."), ("visual.trunk.stages.", "vision_stages.")):
        if name.startswith(theirs):
            return to_hf("model.vision_tower_aux." + original + name.removeprefix(theirs))
    return "" if _OPENCLIP_REST.match(name) else None
