"""The vision side of MGM: the ConvNeXt tower, patch info mining and the projector.

Patch info mining (Li et al. 2024, "Mini-Gemini", arXiv:2403.18814, section 3.2): every CLIP patch token queries the
ConvNeXt features of its own image region and adds what it finds. The numbers equal the original code's; the order of
the arithmetic does not, see `mine_patch_info_folded`.

Shapes: N images or views, T tokens each, P high-resolution positions a token, C CLIP's width, A ConvNeXt's.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.convnext.modeling_convnext import (
    ConvNextEmbeddings,
    ConvNextPreTrainedModel,
    ConvNextStage,
)

from .configuration import MGMConfig, MGMConvNextConfig


class MGMConvNextModel(ConvNextPreTrainedModel):
    """ConvNeXt without its final norm, giving all stages as one map: what the original's OpenCLIP tower gives."""

    config: MGMConvNextConfig
    # It has no attention, so whatever implementation the other parts use is fine.
    _supports_flash_attn = _supports_sdpa = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: MGMConvNextConfig):
        super().__init__(config)
        self.embeddings = ConvNextEmbeddings(config)
        rates = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").split(list(config.depths))
        widths = config.hidden_sizes
        stages = [
            ConvNextStage(
                config,
                widths[max(index - 1, 0)],
                width,
                stride=1 if index == 0 else 2,
                depth=depth,
                drop_path_rates=rate.tolist(),
            )
            for index, (width, depth, rate) in enumerate(zip(widths, config.depths, rates, strict=True))
        ]
        # A dict only for the names, which are transformers' own: encoder.stages.N
        self.encoder = nn.ModuleDict({"stages": nn.ModuleList(stages)})
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = config.layer_norm_eps
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(N, 3, S, S) -> (N, sum of stage widths, S/4, S/4): later stages are upscaled to the first one's size."""
        hidden = self.embeddings(pixel_values)
        stages = []
        for stage in self.encoder["stages"]:  # type: ignore[attr-defined]
            hidden = stage(hidden)
            stages.append(hidden)
        size = stages[0].shape[-2:]
        upscaled = [
            F.interpolate(stage.float(), size=size, mode="bilinear", align_corners=False).to(stage.dtype)
            for stage in stages[1:]
        ]
        return torch.cat([stages[0], *upscaled], dim=1)


class MGMUniProjector(nn.Module):
    """LayerNorm, then a linear map to the CLIP width: one of the original's `vlm_uni_*_projector`."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.norm = nn.LayerNorm(in_features)
        self.proj = nn.Linear(in_features, out_features)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features)."""
        return self.proj(self.norm(hidden))

    @property
    def foldable(self) -> bool:
        """Whether the two layers are what they seem, so that their weights may be read directly."""
        # A wrapped linear (LoRA, bitsandbytes) has more to its output than `weight` and `bias`.
        return type(self.proj) is nn.Linear and type(self.norm) is nn.LayerNorm

    def foldable_on(self, device: torch.device) -> bool:
        """`foldable`, and the weights are there (not on another device, nor offloaded until the module is called)."""
        return self.foldable and self.proj.weight.device == device == self.norm.weight.device


def mine_patch_info(
    queries: torch.Tensor, positions: torch.Tensor, uni_key: MGMUniProjector, uni_value: MGMUniProjector
) -> torch.Tensor:
    """Attention of each token over the positions of its own region, straight from the definition.

    Args:
        queries: (N, T, C) projected CLIP tokens.
        positions: (N, T, P, A) ConvNeXt features, A its total width.
    """
    keys = uni_key(positions)
    scores = queries.unsqueeze(2).to(keys.device) @ (keys.transpose(-1, -2) / keys.shape[-1] ** 0.5)
    attention = scores.nan_to_num().softmax(-1)
    values = uni_value(positions)
    return (attention.to(values.device) @ values).squeeze(2)


def mine_patch_info_folded(
    queries: torch.Tensor, positions: torch.Tensor, uni_key: MGMUniProjector, uni_value: MGMUniProjector
) -> torch.Tensor:
    """The same, without projecting any high-resolution position.

    A key is W(g*x+b)+c with x the normalized position, so q.key = (g*(qW)).x + q.(Wb+c), and attention sums to one, so
    values can be projected after averaging. At MGM-2B's size this turns 434 GFLOP an image into 8. The second term is
    equal for all positions of a token, so softmax ignores it; it stays so that every parameter has a gradient (zero).
    Arguments and result as in `mine_patch_info`.
    """
    return mine_normalized(queries, normalize_positions(positions, uni_key), uni_key, uni_value)


def normalize_positions(positions: torch.Tensor, uni_key: MGMUniProjector) -> torch.Tensor:
    """The half of the uni-modules' LayerNorm that has no parameters, the same for keys and values."""
    return F.layer_norm(positions, positions.shape[-1:], eps=uni_key.norm.eps)


def mine_normalized(
    queries: torch.Tensor, normalized: torch.Tensor, uni_key: MGMUniProjector, uni_value: MGMUniProjector
) -> torch.Tensor:
    """`mine_patch_info_folded` behind `normalize_positions`: all of it that learns."""
    queries = queries * queries.shape[-1] ** -0.5
    probes = queries @ uni_key.proj.weight * uni_key.norm.weight
    scores = (
        probes.unsqueeze(2) @ normalized.transpose(-1, -2)
        + (queries @ uni_key.proj(uni_key.norm.bias))[..., None, None]
    )
    found = (scores.nan_to_num().softmax(-1) @ normalized).squeeze(2)
    return uni_value.proj(found * uni_value.norm.weight + uni_value.norm.bias)


def build_projector(config: MGMConfig) -> nn.Module:
    """CLIP width -> text width, as `mm_projector_type` says."""
    width_in, width_out = config.vision_config.hidden_size, config.text_config.hidden_size
    if config.mm_projector_type == "identity":
        return nn.Identity()
    if config.mm_projector_type == "linear":
        return nn.Linear(width_in, width_out)
    depth = int(config.mm_projector_type.removeprefix("mlp").removesuffix("x_gelu"))
    layers: list[nn.Module] = [nn.Linear(width_in, width_out)]
    for _ in range(1, depth):
        layers += [nn.GELU(), nn.Linear(width_out, width_out)]
    return nn.Sequential(*layers)


def gather_regions(maps: torch.Tensor, regions_per_side: int) -> torch.Tensor:
    """(N, A, S, S) -> (N, regions, positions in a region, A), regions and positions in reading order."""
    n, channels, side, _ = maps.shape
    region = side // regions_per_side
    maps = maps.permute(0, 2, 3, 1).reshape(n, regions_per_side, region, regions_per_side, region, channels)
    return maps.permute(0, 1, 3, 2, 4, 5).reshape(n, regions_per_side**2, region**2, channels)
