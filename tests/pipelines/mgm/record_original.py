"""Run the original code on `original_cases.py` and write what it gives to `data/cases.safetensors`.

    git clone https://github.com/dvlab-research/MGM
    python -m tests.pipelines.mgm.record_original --original MGM --output tests/pipelines/mgm/data/cases.safetensors

`mgm_arch.py`, `clip_encoder.py` and `openclip_encoder.py` run as they are, on today's torch and transformers. What is
not the original's here: the language models (transformers' own, which the original subclasses), ConvNeXt's blocks
(timm's, written out below because timm needs torchvision), and old Gemma's scaling of `inputs_embeds`, which
transformers moved elsewhere. The recorder first reproduces the recorded `mgm_gemma`, so these stand-ins are checked
too.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    GemmaConfig,
    LlamaConfig,
    MixtralConfig,
)

from . import original_cases as cases


def import_original(root: Path) -> types.SimpleNamespace:
    """The original's modules, without its packages' `__init__` and without DeepSpeed, open_clip and timm."""

    def module(name: str, **members: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__dict__.update(members)
        sys.modules[name] = made
        return made

    for package in ("mgm", "mgm.model", "mgm.model.multimodal_encoder", "mgm.model.multimodal_projector"):
        module(package, __path__=[str(root / package.replace(".", "/"))])
    module("mgm.model.processor", __path__=[])
    module("mgm.model.processor.video_processor", VideoFramesProcessor=None)
    module("mgm.model.multimodal_encoder.eva_encoder", EVAVisionTower=None)
    module("transformers.deepspeed", is_deepspeed_zero3_enabled=lambda: False, deepspeed_config=None)
    module("deepspeed")
    module("open_clip", __path__=[])
    module("open_clip.factory", load_state_dict=None, get_model_config=None)
    names = ["_build_vision_tower", "convert_to_custom_text_state_dict", "resize_pos_embed"]
    module("open_clip.model", CLIPVisionCfg=None, CLIPTextCfg=None, **dict.fromkeys(names))
    from mgm.model import mgm_arch
    from mgm.model.multimodal_encoder.clip_encoder import CLIPVisionTower
    from mgm.model.multimodal_encoder.openclip_encoder import OpenCLIPVisionTower
    from mgm.model.multimodal_projector.builder import build_vision_projector

    return types.SimpleNamespace(
        arch=mgm_arch, clip=CLIPVisionTower, openclip=OpenCLIPVisionTower, projector=build_vision_projector
    )


class LayerNorm2d(nn.LayerNorm):
    """timm's: over channels of (N, C, H, W)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """timm's `ConvNeXtBlock`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv_dw(x).permute(0, 2, 3, 1))
        y = self.mlp["fc2"](F.gelu(self.mlp["fc1"](y)))
        return x + (y * self.gamma).permute(0, 3, 1, 2)


class Stage(nn.Module):
    """timm's `ConvNeXtStage`."""

    def __init__(self, before: int, width: int, depth: int, first: bool) -> None:
        super().__init__()
        self.downsample = (
            nn.Identity()
            if first
            else nn.Sequential(LayerNorm2d(before, eps=1e-6), nn.Conv2d(before, width, 2, stride=2))
        )
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.downsample(x))


def build(original: types.SimpleNamespace, checkpoint: Path) -> Any:
    """The original model around today's language model, with the checkpoint's weights; every tensor has a place."""
    config = types.SimpleNamespace(**json.loads((checkpoint / "config.json").read_text()))
    tensors = load_file(checkpoint / "model.safetensors")

    core = nn.Module()
    core.vision_tower = original.clip.__new__(original.clip)
    nn.Module.__init__(core.vision_tower)
    core.vision_tower.select_layer = config.mm_vision_select_layer
    core.vision_tower.select_feature = config.mm_vision_select_feature
    core.vision_tower.is_optimize = False
    clip = CLIPVisionConfig.from_pretrained(checkpoint.parent / "openai-clip-tiny")
    core.vision_tower.vision_tower = CLIPVisionModel(clip)
    aux = core.vision_tower_aux = original.openclip.__new__(original.openclip)
    nn.Module.__init__(aux)
    aux.is_optimize = False
    widths, depths = [8, 16, 32, 64], [1, 1, 2, 1]
    aux.vision_stem = nn.Sequential(nn.Conv2d(3, widths[0], 4, stride=4), LayerNorm2d(widths[0], eps=1e-6))
    aux.vision_stages = nn.Sequential(
        *(Stage(widths[max(i - 1, 0)], widths[i], depths[i], first=i == 0) for i in range(4))
    )
    core.mm_projector = original.projector(config)
    for name, width in (
        ("query", config.mm_hidden_size),
        ("aux", config.mm_hidden_size_aux),
        ("val", config.mm_hidden_size_aux),
    ):
        layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.mm_hidden_size))
        setattr(core, f"vlm_uni_{name}_projector", layers)
    core.get_vision_tower = lambda: core.vision_tower
    core.get_vision_tower_aux = lambda: core.vision_tower_aux

    vision = ("model.vision_tower", "model.mm_projector", "model.vlm_uni")
    ours = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith(vision)}
    ours = {
        n.replace("vision_tower.vision_tower.vision_model.", "vision_tower.vision_tower."): t for n, t in ours.items()
    }
    core.load_state_dict(ours, strict=True)
    text = {name: tensor for name, tensor in tensors.items() if not name.startswith(vision)}
    lm = language_model(config, text)
    core.embed_tokens = lambda ids: F.embedding(ids, lm.get_input_embeddings().weight)

    class Model(original.arch.MGMMetaForCausalLM):
        def get_model(self) -> Any:
            return core

    model = Model()
    model.config, model.lm, model.core = config, lm, core
    return model


def language_model(config: types.SimpleNamespace, tensors: dict[str, torch.Tensor]) -> Any:
    """transformers' own causal model, loaded by `from_pretrained` from the original's tensors."""
    kind = {"mgm_gemma": GemmaConfig, "mgm": LlamaConfig, "mgm_mixtral": MixtralConfig}[config.model_type]
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    names += ["num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "hidden_act"]
    names += ["num_local_experts", "sliding_window", "max_position_embeddings"]
    text = kind(**{name: getattr(config, name) for name in names if hasattr(config, name)})
    with tempfile.TemporaryDirectory() as directory:
        text.architectures = [kind.__name__.replace("Config", "ForCausalLM")]
        text.save_pretrained(directory)
        save_file(tensors, Path(directory) / "model.safetensors", metadata={"format": "pt"})
        model, info = AutoModelForCausalLM.from_pretrained(
            directory, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
        )
    assert not any(info.values()), info
    return model.eval()


def scaled(model: Any, embeds: torch.Tensor) -> torch.Tensor:
    """What old Gemma did to all `inputs_embeds`."""
    return embeds * model.config.hidden_size**0.5 if model.config.model_type == "mgm_gemma" else embeds


@torch.no_grad()
def run(
    model: Any, rows: list[list[int]], labels: list[list[int]], images: torch.Tensor, aux: torch.Tensor
) -> dict[str, Any]:
    """Image features, merged embeddings, mask, logits and loss of the original."""
    ids = cases.padded(rows)
    mask = cases.padded([[1] * len(row) for row in rows])
    _, _, mask, _, embeds, merged = model.prepare_inputs_labels_for_multimodal(
        ids, None, mask, None, cases.padded(labels, -100), images, aux
    )
    logits = model.lm(inputs_embeds=scaled(model, embeds), attention_mask=mask).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), merged[:, 1:].flatten())
    features = model.encode_images(images, aux)
    return {"features": features, "embeds": embeds, "mask": mask, "logits": logits, "loss": loss}


@torch.no_grad()
def greedy(model: Any, row: list[int], images: torch.Tensor, aux: torch.Tensor) -> torch.Tensor:
    """The next tokens of one row, without a cache."""
    ids, found = torch.tensor([row]), []
    *_, embeds, _ = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, images, aux)
    for _ in range(cases.NEW_TOKENS):
        found.append(model.lm(inputs_embeds=scaled(model, embeds)).logits[0, -1].argmax())
        embeds = torch.cat([embeds, model.core.embed_tokens(found[-1].view(1, 1))], dim=1)
    return torch.stack(found)


def views(config: types.SimpleNamespace, aux: torch.Tensor) -> torch.Tensor:
    """`images` of the original's data loader for normalized high-resolution images (eval/model_vqa_loader.py)."""
    grid, size = config.image_grid, 56
    images = F.interpolate(aux, size=[size * grid, size * grid], mode="bilinear", align_corners=False)
    if grid == 1:
        return images
    out = []
    for image in images:
        raw = image.reshape(3, grid, size, grid, size).permute(1, 3, 0, 2, 4).reshape(-1, 3, size, size)
        if config.image_global:
            whole = F.interpolate(image[None], size=[size, size], mode="bilinear", align_corners=False)
            raw = torch.cat([raw, whole], dim=0)
        out.append(raw)
    return torch.stack(out)


def main() -> None:
    """Check the stand-ins against the recorded case, then record the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--original", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    original = import_original(args.original)
    known = load_file(cases.DATA / "mgm_gemma" / "expected.safetensors")
    recorded: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as directory:
        model = build(original, cases.write_checkpoint(cases.CASES[0], Path(directory) / "known"))
        lengths = known["attention_mask"].sum(1).tolist()
        rows, labels = (
            [r[:n] for r, n in zip(known[key].tolist(), lengths, strict=True)] for key in ("input_ids", "labels")
        )
        again = run(model, rows, labels, known["pixel_values"], known["pixel_values_aux"])
        for key, name in (("features", "image_features"), ("embeds", "inputs_embeds"), ("logits", "logits")):
            valid = ... if key == "features" else known["merged_mask"].bool()
            difference = float((again[key][valid] - known[name][valid]).abs().max())
            print(f"recorded {name}: difference {difference:.1e}")
            assert difference < 2e-5
        for case in cases.CASES:
            model = build(original, cases.write_checkpoint(case, Path(directory) / case.name))
            aux = torch.cat([known["pixel_values_aux"], torch.zeros(1, 3, 128, 128)])  # the dummy of the row without
            images = views(model.config, aux)
            out = run(model, cases.ROWS, cases.labels_of(cases.ROWS), images, aux)
            valid = out["mask"].bool()
            recorded[f"{case.name}.image_features"] = out["features"][:3].contiguous()
            recorded[f"{case.name}.inputs_embeds"] = out["embeds"][valid][::8].contiguous()
            recorded[f"{case.name}.logits"] = out["logits"][valid][::8].contiguous()
            recorded[f"{case.name}.loss"] = out["loss"].view(1)
            starts = [(0, 2), (2, 3), (3, 4)]
            tokens = [greedy(model, row, images[a:b], aux[a:b]) for row, (a, b) in zip(cases.ROWS, starts, strict=True)]
            recorded[f"{case.name}.generated"] = torch.stack(tokens)
            print(f"{case.name}: {int(valid.sum())} tokens, loss {float(out['loss']):.4f}")
    save_file(recorded, args.output)


if __name__ == "__main__":
    main()
