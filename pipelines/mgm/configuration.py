"""MGM's configuration: a language model, a CLIP tower, a ConvNeXt tower and how their features meet.

Only relative imports here and in modeling.py, processing.py and image_processing.py: a saved model directory may carry
copies of these files (`auto_map`), which must work without captune.
"""

import re
from typing import Any

from transformers import AutoConfig, CLIPVisionConfig, ConvNextConfig, PreTrainedConfig


class MGMConvNextConfig(ConvNextConfig):
    """A ConvNeXt trunk as timm and OpenCLIP build it: stem and stages, no final norm.

    Differs from `ConvNextConfig` in one thing: `layer_norm_eps` is the epsilon of *every* LayerNorm (timm's default is
    1e-6, `convnext_xxlarge` uses 1e-5), where transformers hard-codes 1e-6 inside the blocks.
    """

    model_type = "mgm_convnext"
    base_config_key = "vision_config_aux"

    hidden_sizes: Any = (96, 192, 384, 768)
    depths: Any = (3, 3, 9, 3)
    layer_norm_eps: float = 1e-6


# The parts of MGM-2B, which are the defaults.
GEMMA_2B = {
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
}
CLIP_LARGE_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
CONVNEXT_LARGE = {"hidden_sizes": [192, 384, 768, 1536], "depths": [3, 3, 27, 3]}


class MGMConfig(PreTrainedConfig):
    """Configuration of `MGMForConditionalGeneration`; the defaults are MGM-2B's.

    Args:
        text_config: any decoder that `AutoModel` knows (Gemma, Llama, Mixtral, ...).
        vision_config: the CLIP tower. Its patch tokens are the queries, one per visual token.
        vision_config_aux: the ConvNeXt tower over the high-resolution image; keys and values.
        image_token_id: the id that stands for one visual token in `input_ids`. It may lie outside of the vocabulary:
            its embedding is never looked up.
        mm_projector_type: "linear", "identity" or "mlp{N}x_gelu".
        vision_select_layer: the CLIP hidden state to use, counted as in the original (-2: the last layer is unused).
        vision_select_feature: only "patch" (drop the class token), the one value that works in the original.
        image_size_aux: side in pixels of the square image that feeds ConvNeXt.
        image_grid: 1, or N to also cut the image into N x N crops for CLIP ("HD").
        image_global: HD only: prepend the tokens of the whole image.
        original_config: of a converted model, the original's `config.json`, for the way back.
    """

    model_type = "mgm"
    sub_configs = {  # transformers 5.20's way to name defaults, `SubConfigSpec`, is unknown to those before it
        "text_config": AutoConfig,
        "vision_config": CLIPVisionConfig,
        "vision_config_aux": MGMConvNextConfig,
    }
    keys_to_ignore_at_inference = ["past_key_values"]

    text_config: Any = None  # each: a dict, a PreTrainedConfig or None
    vision_config: Any = None
    vision_config_aux: Any = None
    image_token_id: int = 256000
    mm_projector_type: str = "mlp2x_gelu"
    vision_select_layer: int = -2
    vision_select_feature: str = "patch"
    image_size_aux: int = 768
    image_grid: int = 1
    image_global: bool = False
    tie_word_embeddings: bool = False
    original_config: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if "mm_vision_tower" in kwargs:
            # The original's Llama variant has model_type "mgm" too, and would load with every weight left out.
            raise ValueError("this is the config.json of an original MGM checkpoint: run `captune convert` on it first")
        self.text_config = _part(self.text_config, AutoConfig, {"model_type": "gemma", **GEMMA_2B})
        self.vision_config = _part(self.vision_config, CLIPVisionConfig, CLIP_LARGE_336)
        self.vision_config_aux = _part(self.vision_config_aux, MGMConvNextConfig, CONVNEXT_LARGE)
        super().__post_init__(**kwargs)
        # Whether the head is tied is a fact about the language model; both places must agree after a reload.
        self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)
        self._check()

    def _check(self) -> None:
        if self.vision_select_feature != "patch":
            raise ValueError(f"vision_select_feature must be 'patch', not {self.vision_select_feature!r}")
        if self.mm_projector_type not in ("linear", "identity") and not re.fullmatch(
            r"mlp[1-9]\d*x_gelu", self.mm_projector_type
        ):
            raise ValueError(
                f"mm_projector_type must be linear, identity or mlp<N>x_gelu, not {self.mm_projector_type!r}"
            )
        if self.image_grid < 1:
            raise ValueError(f"image_grid must be at least 1, not {self.image_grid}")
        if self.image_global and self.image_grid == 1:
            raise ValueError("image_global adds a whole-image view to the crops of image_grid > 1; image_grid is 1")
        depth = self.vision_config.num_hidden_layers
        if not -depth - 1 <= self.vision_select_layer <= depth:
            raise ValueError(f"vision_select_layer {self.vision_select_layer} does not exist in {depth} CLIP layers")
        stem = self.vision_config_aux.patch_size
        side = self.image_size_aux // stem
        if self.image_size_aux % stem or side % (self.image_grid * self.patches_per_side):
            raise ValueError(
                f"image_size_aux {self.image_size_aux} gives ConvNeXt features of side {side}, which do not "
                f"divide into "
                f"{self.image_grid} x {self.patches_per_side} CLIP patches a side"
            )

    @property
    def patches_per_side(self) -> int:
        """CLIP patches along one side of one view."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def num_views(self) -> int:
        """Views of one image that go through CLIP: crops, then the whole image if `image_global`."""
        return self.image_grid**2 + int(self.image_global)

    @property
    def num_image_tokens(self) -> int:
        """Visual tokens of one image: how often `image_token_id` stands in `input_ids` for it."""
        return self.num_views * self.patches_per_side**2


def _part(given: Any, kind: Any, default: dict[str, Any]) -> PreTrainedConfig:
    """A part's configuration from whatever stands in its place: itself, its dict, or None for MGM-2B's."""
    if isinstance(given, PreTrainedConfig):
        return given
    values = dict(default if given is None else given)
    return kind.for_model(values.pop("model_type", "gemma"), **values) if kind is AutoConfig else kind(**values)


AutoConfig.register("mgm_convnext", MGMConvNextConfig, exist_ok=True)
AutoConfig.register("mgm", MGMConfig, exist_ok=True)

__all__ = ["MGMConfig", "MGMConvNextConfig"]
