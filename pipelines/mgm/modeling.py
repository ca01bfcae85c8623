"""MGM in the shape that multimodal models have in transformers (compare `models/llava`).

Shape suffixes: N images, V views an image, T tokens a view, C CLIP's width, D the language model's.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoModelForImageTextToText, CLIPVisionModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration import MGMConfig, MGMConvNextConfig
from .processing import MGMProcessor  # noqa: F401  (registers the processors: Auto classes must agree)
from .vision import (
    MGMConvNextModel,
    MGMUniProjector,
    build_projector,
    gather_regions,
    mine_patch_info,
    mine_patch_info_folded,
)

# One image's high-resolution features: 212 MB at MGM-2B's size in bfloat16. On a CPU, pieces that stay near the caches
# and that the allocator reuses are faster than one large one; on a GPU this only bounds memory.
_CPU_BYTES, _GPU_BYTES = 8 << 20, 2 << 30


def _keep_freed_memory() -> None:
    """Make glibc keep what is freed on a CPU, once and for the whole process, up to 64 MB.

    It hands large blocks back to the system until it has seen one of up to 32 MB come and go; getting memory anew costs
    a page fault every 4 KB, which was a third of the time that encoding 16 small images took. Other allocators ignore
    it.
    """
    block = torch.empty(31 << 20, dtype=torch.uint8, device="cpu")  # never touched, so it takes no memory
    del block


@dataclass
class MGMModelOutputWithPast(BaseModelOutputWithPast):
    """`image_hidden_states`: (N, V*T, D), the features of this call's images; None when there were none."""

    image_hidden_states: torch.Tensor | None = None


@dataclass
class MGMCausalLMOutputWithPast(ModelOutput):
    """loss: (); logits: (batch, length, vocabulary); image_hidden_states: (N, V*T, D)."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor] | None = None
    attentions: tuple[torch.FloatTensor] | None = None
    image_hidden_states: torch.Tensor | None = None


class MGMPreTrainedModel(PreTrainedModel):
    """What transformers has to know about MGM's classes."""

    config: MGMConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["CLIPEncoderLayer", "ConvNextLayer", "MGMUniProjector"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Every quantizer of transformers leaves these alone without being told: the towers, and what is trained beside
    # LoRA. Patterns, because they must match here and inside `MGMForConditionalGeneration`.
    _keep_in_fp32_modules = _not_quantized = [
        r"(model\.)?vision_tower",
        r"(model\.)?vision_tower_aux",
        r"(model\.)?uni_(query|key|value)",
        r"(model\.)?multi_modal_projector",
    ]

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """The list above is about quantization, whatever its name says: these modules have the dtype asked for."""
        plan: dict[str, torch.dtype] = super()._get_dtype_plan(dtype)
        return {pattern: kept for pattern, kept in plan.items() if pattern not in self._not_quantized}


class MGMModel(MGMPreTrainedModel):
    """Towers, mining, projector and the language model without its head."""

    def __init__(self, config: MGMConfig):
        super().__init__(config)
        width, width_aux = config.vision_config.hidden_size, sum(config.vision_config_aux.hidden_sizes)
        self.vision_tower = CLIPVisionModel._from_config(config.vision_config)
        self.vision_tower_aux = MGMConvNextModel._from_config(config.vision_config_aux)
        self.uni_query = MGMUniProjector(width, width)
        self.uni_key = MGMUniProjector(width_aux, width)
        self.uni_value = MGMUniProjector(width_aux, width)
        self.multi_modal_projector = build_projector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        _keep_freed_memory()
        # Old Gemma multiplied *all* inputs_embeds by sqrt(hidden_size), so the original's image features were trained
        # to be scaled too. Today the embedding layer scales only what it looks up. Read once: PEFT may wrap the layer.
        self.text_scale = float(getattr(self.language_model.get_input_embeddings(), "scalar_embed_scale", 1.0))
        self.post_init()

    def encode_views(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(views, 3, H, W) -> (views, T, C): CLIP's hidden state `vision_select_layer`, without the class token."""
        tower = self.vision_tower
        layers = tower.encoder.layers
        select = self.config.vision_select_layer
        used = select if select >= 0 else len(layers) + 1 + select
        hidden = tower.pre_layrnorm(tower.embeddings(pixel_values))
        for layer in layers[:used]:
            hidden = layer(hidden, None)
        return hidden[:, 1:]

    def get_image_features(
        self, pixel_values: torch.Tensor, pixel_values_aux: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """Visual tokens after the projector, before any text scaling.

        Args:
            pixel_values: (N, 3, H, W), or in HD (N, V, 3, H, W) with the global view last.
            pixel_values_aux: (N, 3, S, S), the whole images at high resolution.

        Returns:
            (N, V*T, D); in HD the global view's tokens come first, then the crops' in reading order.
        """
        self._check_images(pixel_values, pixel_values_aux)
        size = self._images_at_once(pixel_values_aux)
        slices = zip(pixel_values.split(size), pixel_values_aux.split(size), strict=True)
        return torch.cat([self._slice_features(*images) for images in slices])

    def _images_at_once(self, pixel_values_aux: torch.Tensor) -> int:
        """How many images' high-resolution features may be in memory at a time: some copies of them are."""
        parameter = self.vision_tower_aux.embeddings.patch_embeddings.weight
        side = self.config.image_size_aux // self.config.vision_config_aux.patch_size
        one_image = side**2 * sum(self.config.vision_config_aux.hidden_sizes) * parameter.element_size()
        return max(1, (_CPU_BYTES if pixel_values_aux.device.type == "cpu" else _GPU_BYTES) // one_image)

    def _slice_features(self, pixel_values: torch.Tensor, pixel_values_aux: torch.Tensor) -> torch.Tensor:
        tokens, positions = self.encode_images(pixel_values, pixel_values_aux)
        # With a device map the modules may lie apart, or on disk, where only calling them helps.
        here = positions.device
        fold = all(module.foldable_on(here) for module in (self.uni_key, self.uni_value))
        mine = mine_patch_info_folded if fold else mine_patch_info
        mined = mine(self.uni_query(tokens).to(here), positions, self.uni_key, self.uni_value)
        return self.multi_modal_projector(tokens.to(mined.device) + mined)

    def encode_images(
        self, pixel_values: torch.Tensor, pixel_values_aux: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the two towers see; arguments as of `get_image_features`.

        Returns:
            CLIP's tokens (N, V*T, C), and the ConvNeXt positions in the region of each of them (N, V*T, P, A).
        """
        self._check_images(pixel_values, pixel_values_aux)
        dtype = self.vision_tower.embeddings.patch_embedding.weight.dtype
        n, grid = pixel_values_aux.shape[0], self.config.image_grid
        tokens_NVTC = self.encode_views(pixel_values.reshape(-1, *pixel_values.shape[-3:]).to(dtype)).unflatten(
            0, (n, -1)
        )
        aux_dtype = self.vision_tower_aux.embeddings.patch_embeddings.weight.dtype
        maps = self.vision_tower_aux(pixel_values_aux.to(aux_dtype)).to(tokens_NVTC.dtype)

        crops = maps.unflatten(-1, (grid, -1)).unflatten(-3, (grid, -1)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        if self.config.image_global:
            whole = F.interpolate(maps.float(), scale_factor=1 / grid, mode="bilinear", align_corners=False)
            crops = torch.cat([whole.to(maps.dtype).unsqueeze(1), crops], dim=1)
            tokens_NVTC = torch.cat([tokens_NVTC[:, -1:], tokens_NVTC[:, :-1]], dim=1)
        positions = gather_regions(crops.flatten(0, 1), self.config.patches_per_side)
        return tokens_NVTC.flatten(1, 2), positions.unflatten(0, (n, -1)).flatten(1, 2)

    def _check_images(self, pixel_values: torch.Tensor, pixel_values_aux: torch.Tensor) -> None:
        config = self.config
        side, views = config.vision_config.image_size, config.num_views
        expected = (3, side, side) if config.image_grid == 1 else (views, 3, side, side)
        if pixel_values.shape[1:] != expected:
            raise ValueError(
                f"pixel_values must be (images, {', '.join(map(str, expected))}), not {tuple(pixel_values.shape)}"
            )
        expected_aux = (pixel_values.shape[0], 3, config.image_size_aux, config.image_size_aux)
        if pixel_values_aux.shape != expected_aux:
            raise ValueError(f"pixel_values_aux must be {expected_aux}, not {tuple(pixel_values_aux.shape)}")

    def _check_length(self, length: int) -> None:
        limit = getattr(self.config.text_config, "max_position_embeddings", None)
        if limit is not None and length > limit:
            raise ValueError(
                f"the prompt is {length} tokens long with its images, over the model's context of {limit} "
                "(text_config.max_position_embeddings)"
            )

    def merge_image_features(
        self, inputs_embeds: torch.Tensor, mask: torch.Tensor, image_features: torch.Tensor
    ) -> torch.Tensor:
        """Put the features, scaled as this language model scales its text, where `mask` (batch, length) is true."""
        places, features = int(mask.sum()), image_features.shape[0] * image_features.shape[1]
        if places != features:
            per_image = image_features.shape[1]
            raise ValueError(
                f"input_ids have {places} image tokens ({places / per_image:g} images of {per_image} tokens), "
                f"but {image_features.shape[0]} images were given"
            )
        # The factor is rounded to the tensor's dtype, as for text.
        scale = torch.tensor(self.text_scale, dtype=inputs_embeds.dtype)
        image_features = image_features.to(inputs_embeds.device, inputs_embeds.dtype) * scale
        return inputs_embeds.masked_scatter(mask.unsqueeze(-1).to(inputs_embeds.device), image_features)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_aux: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MGMModelOutputWithPast:
        """As `MGMForConditionalGeneration.forward`; `image_features` are the result of an earlier
        `get_image_features`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if (pixel_values is None) != (pixel_values_aux is None):
            raise ValueError("pixel_values and pixel_values_aux go together: one image, two resolutions")
        if pixel_values is not None and pixel_values_aux is not None:
            image_features = self.get_image_features(pixel_values, pixel_values_aux)
        if input_ids is not None:
            mask: torch.Tensor = input_ids.eq(self.config.image_token_id)
            # The image token need not have an embedding: look up any other one in its place.
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(mask, 0))
            if image_features is not None:
                inputs_embeds = self.merge_image_features(inputs_embeds, mask, image_features)
            elif input_ids.shape[1] > 1 and not torch.compiler.is_compiling() and mask.any():
                raise ValueError(f"input_ids have {int(mask.sum())} image tokens, but no images were given")
        elif image_features is not None:
            raise ValueError("images need input_ids, which say where they go; inputs_embeds must be merged already")
        self._check_length(inputs_embeds.shape[1])  # type: ignore[union-attr]

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        return MGMModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
        )


class MGMForConditionalGeneration(MGMPreTrainedModel, GenerationMixin):
    """MGM with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: MGMConfig):
        super().__init__(config)
        self.model = MGMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def get_image_features(
        self, pixel_values: torch.Tensor, pixel_values_aux: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """See `MGMModel.get_image_features`: (N, V*T, D) after the projector, before any text scaling."""
        return self.model.get_image_features(pixel_values, pixel_values_aux)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_aux: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> MGMCausalLMOutputWithPast:
        """One pass.

        Args:
            input_ids: (batch, length) with `config.image_token_id` once per visual token. Rows may hold any number of
                images; the images of all rows come in reading order.
            pixel_values: (images, 3, H, W); HD: (images, views, 3, H, W), global view last.
            pixel_values_aux: (images, 3, S, S).
            image_features: (images, tokens, width), instead of the two above.
            labels: (batch, length), -100 where no loss is wanted (all image tokens).
            logits_to_keep: compute logits only for the last so many positions (0: all) or for these indices.

        Raises:
            ValueError: images and image tokens do not match, or `length` is over the context length.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            pixel_values_aux=pixel_values_aux,
            image_features=image_features,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return MGMCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: torch.LongTensor,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_aux: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What one step of `generate` passes to `forward`: images only in the first, unless nothing is cached."""
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration or not kwargs.get("use_cache", True):
            inputs |= {
                "pixel_values": pixel_values,
                "pixel_values_aux": pixel_values_aux,
                "image_features": image_features,
            }
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        """Repeat rows for beams and several samples: each image is encoded once, a row's images stay together."""
        images = {key: model_kwargs.pop(key, None) for key in ("pixel_values", "pixel_values_aux", "image_features")}
        if expand_size > 1 and input_ids is not None:
            features = images["image_features"]
            if images["pixel_values"] is not None:
                features = self.get_image_features(images["pixel_values"], images["pixel_values_aux"])
            images = {"image_features": features}
            if features is not None:
                places = (input_ids == self.config.image_token_id).sum(1) // features.shape[1]
                rows = torch.arange(len(places), device=places.device).repeat_interleave(places)
                # Image order after expansion: row 0's images `expand_size` times over, then row 1's, ...
                order = (rows.repeat(expand_size) * expand_size) + torch.arange(
                    expand_size, device=places.device
                ).repeat_interleave(len(rows))
                index = torch.arange(len(rows), device=places.device).repeat(expand_size)
                images["image_features"] = features[index[torch.argsort(order, stable=True)].to(features.device)]
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | {key: value for key, value in images.items() if value is not None}


AutoModel.register(MGMConvNextConfig, MGMConvNextModel, exist_ok=True)
AutoModel.register(MGMConfig, MGMModel, exist_ok=True)
AutoModelForImageTextToText.register(MGMConfig, MGMForConditionalGeneration, exist_ok=True)

__all__ = ["MGMConvNextModel", "MGMForConditionalGeneration", "MGMModel", "MGMPreTrainedModel"]
