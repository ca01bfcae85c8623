"""The model itself: HD arithmetic, saving, gradients, adapters, precisions, other language models."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForImageTextToText,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pipelines.mgm.configuration import MGMConfig
from pipelines.mgm.image_processing import MGMImageProcessor
from pipelines.mgm.modeling import MGMForConditionalGeneration, mine_patch_info, mine_patch_info_folded

from .conftest import noise_image

MakeModel = Callable[..., MGMForConditionalGeneration]
HD = [(1, False), (2, False), (2, True)]


def images(model: MGMForConditionalGeneration, count: int = 2) -> dict[str, torch.Tensor]:
    processor = MGMImageProcessor.from_config(model.config)
    return dict(processor([noise_image(seed, 40 + 10 * seed) for seed in range(count)]))


def batch(model: MGMForConditionalGeneration, count: int = 2) -> dict[str, torch.Tensor]:
    config = model.config
    row = [2, *[config.image_token_id] * config.num_image_tokens, 20, 21, 22]
    ids = torch.tensor([row] * count)
    labels = ids.masked_fill(ids == config.image_token_id, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels} | images(model, count)


def features_by_hand(model: MGMForConditionalGeneration, views: torch.Tensor, aux: torch.Tensor) -> torch.Tensor:
    """One image, from the paper and the original's description: crop by crop, patch by patch, straight definitions."""
    core, grid = model.model, model.config.image_grid
    side = model.config.patches_per_side
    tokens = core.vision_tower(views, output_hidden_states=True).hidden_states[-2][:, 1:]
    feature_map = core.vision_tower_aux(aux[None])
    height = feature_map.shape[-1] // grid
    parts = []
    if model.config.image_global:  # the last view, but the first tokens
        small = F.interpolate(feature_map, scale_factor=1 / grid, mode="bilinear", align_corners=False)
        parts.append((tokens[-1], small[0]))
    for row in range(grid):
        for column in range(grid):
            crop = feature_map[0, :, row * height : (row + 1) * height, column * height : (column + 1) * height]
            parts.append((tokens[row * grid + column], crop))
    found = []
    for view, crop in parts:
        size = crop.shape[-1] // side
        for index, token in enumerate(view):
            top, left = index // side * size, index % side * size
            region = crop[:, top : top + size, left : left + size].flatten(1).T
            scores = core.uni_key(region) @ core.uni_query(token) / token.shape[-1] ** 0.5
            found.append(token + scores.softmax(0) @ core.uni_value(region))
    return core.multi_modal_projector(torch.stack(found))


@pytest.mark.parametrize(("grid", "whole"), HD)
@torch.no_grad()
def test_image_features_equal_the_definition(make_model: MakeModel, grid: int, whole: bool) -> None:
    model = make_model(image_grid=grid, image_global=whole, image_size_aux=64 * grid)
    pixels = images(model)
    views = pixels["pixel_values"] if grid > 1 else pixels["pixel_values"].unsqueeze(1)
    assert views.shape[1] == model.config.num_views
    actual = model.get_image_features(**pixels)
    assert actual.shape == (2, model.config.num_image_tokens, 32)
    by_hand = [features_by_hand(model, *pair) for pair in zip(views, pixels["pixel_values_aux"], strict=True)]
    torch.testing.assert_close(actual, torch.stack(by_hand), atol=1e-4, rtol=1e-4)
    assert torch.isfinite(model(**batch(model)).loss)


@pytest.mark.parametrize("layer", [-1, -2, -4, 0, 2, 3])
@torch.no_grad()
def test_the_selected_clip_layer_is_counted_as_in_the_original(make_model: MakeModel, layer: int) -> None:
    """Layers that come after it are not run, which must not change the count: 0 is what enters the first of three."""
    model = make_model(vision_select_layer=layer)
    pixels = images(model)["pixel_values"]
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(model.model.encode_views(pixels), states[layer][:, 1:])


def test_folded_mining_equals_the_definition_and_its_gradients(model: MGMForConditionalGeneration) -> None:
    core = model.model
    queries, positions = torch.randn(2, 4, 32), torch.randn(2, 4, 9, 80)
    gradients = []
    for mine in (mine_patch_info, mine_patch_info_folded):
        model.zero_grad()
        result = mine(queries, positions, core.uni_key, core.uni_value)
        result.square().sum().backward()
        gradients.append([result.detach(), core.uni_key.proj.weight.grad, core.uni_value.norm.bias.grad])
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-4)


def test_save_and_load_keeps_every_tensor(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(image_grid=2, image_global=True, image_size_aux=128)
    model.save_pretrained(tmp_path)
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    for key in ("image_grid", "image_global", "image_size_aux", "num_image_tokens", "image_token_id"):
        assert getattr(again.config, key) == getattr(model.config, key)
    assert again.lm_head.weight is again.get_input_embeddings().weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precisions_have_no_nan_and_stay_close(
    model: MGMForConditionalGeneration, tmp_path: Path, dtype: torch.dtype
) -> None:
    expected = model(**batch(model)).logits
    model.to(dtype).save_pretrained(tmp_path)
    half = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype="auto").eval()
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    logits = half(**batch(half)).logits.float()
    assert torch.isfinite(logits).all()
    assert (logits - expected).abs().mean() < 0.15 * expected.abs().mean()


def test_gradients_reach_projector_and_uni_modules_with_checkpointing(model: MGMForConditionalGeneration) -> None:
    model.model.vision_tower.requires_grad_(False)
    model.model.vision_tower_aux.requires_grad_(False)
    data = batch(model)
    model(**data).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.train()
    new = hasattr(model, "activation_checkpointing_enable")  # its name in transformers from 5.20 on
    (model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable)()
    passes: list[str] = []
    for layer in model.model.language_model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: passes.append("mlp"))
    loss = model(**data).loss
    assert len(passes) == 2
    loss.backward()
    assert len(passes) == 4  # computed again instead of kept
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad, plain[name], atol=1e-5, rtol=1e-4, msg=name)
    assert plain["model.uni_key.proj.weight"].abs().max() > 0


def test_lora_by_full_path_touches_only_the_language_model(model: MGMForConditionalGeneration, tmp_path: Path) -> None:
    data = batch(model)
    expected = model(**data).logits
    targets = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    torch.testing.assert_close(adapted(**data).logits, expected)
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(names) == 2 * 7 * 2 and all(".language_model.layers." in name for name in names)
    adapted(**data).loss.backward()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    changed = adapted(**data).logits
    torch.testing.assert_close(adapted.merge_and_unload()(**data).logits, changed, atol=1e-4, rtol=1e-4)


def test_lora_on_the_uni_modules_is_not_bypassed(model: MGMForConditionalGeneration) -> None:
    """The fast path reads weights directly; with an adapter on them it must step aside."""
    pixels = images(model)
    before = model.get_image_features(**pixels)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=r"model\.uni_(key|value)\.proj"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert not torch.allclose(adapted.base_model.model.get_image_features(**pixels), before, atol=1e-2)


def test_resized_embeddings_keep_logits_tying_and_gemmas_scale(
    model: MGMForConditionalGeneration, tokenizer: PreTrainedTokenizerFast
) -> None:
    data = batch(model)
    before = model(**data).logits
    model.resize_token_embeddings(len(tokenizer) + 5)
    after = model(**data).logits
    assert after.shape[-1] == len(tokenizer) + 5
    torch.testing.assert_close(after[..., : len(tokenizer)], before, atol=1e-5, rtol=1e-5)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def small(kind: type[PreTrainedConfig], **kwargs: Any) -> PreTrainedConfig:
    return kind(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        **kwargs,
    )


@pytest.mark.parametrize(
    "text", [small(LlamaConfig), small(MixtralConfig, num_local_experts=2)], ids=["llama", "mixtral"]
)
@torch.no_grad()
def test_other_language_models_save_load_and_do_not_scale(
    make_model: MakeModel, tmp_path: Path, text: PreTrainedConfig
) -> None:
    model = make_model(text_config=text, image_token_id=400)
    assert model.model.text_scale == 1.0
    expected = model(**batch(model)).logits
    model.save_pretrained(tmp_path)
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(again(**batch(again)).logits, expected)


def test_attention_implementation_reaches_tower_and_language_model(make_model: MakeModel, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    eager = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="eager").eval()
    sdpa = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    assert eager.model.language_model.config._attn_implementation == "eager"
    assert sdpa.model.vision_tower.config._attn_implementation == "sdpa"
    data = batch(eager)
    torch.testing.assert_close(eager(**data).logits, sdpa(**data).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_size_aux": 60}, "do not divide"),
        ({"image_global": True}, "image_grid is 1"),
        ({"mm_projector_type": "mlp0x_gelu"}, "mm_projector_type"),
        ({"vision_select_feature": "cls_patch"}, "must be 'patch'"),
        ({"vision_select_layer": -9}, "does not exist"),
        ({"mm_vision_tower": "openai"}, "captune convert"),
    ],
)
def test_impossible_configurations_name_the_key(make_model: MakeModel, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(**wrong)


def test_every_attention_goes_through_the_selected_function(model: MGMForConditionalGeneration) -> None:
    """What FlashAttention-2 and any other kernel needs: CLIP's used layers and all of the language model's ask for
    it.
    """
    calls: list[str] = []

    def spy(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(type(module).__name__)
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", sdpa_mask)
    data = batch(model)
    expected = model(**data).logits
    model.set_attn_implementation("spy")
    torch.testing.assert_close(model(**data).logits, expected, atol=1e-5, rtol=1e-5)
    assert calls == ["CLIPAttention"] * 2 + ["GemmaAttention"] * 2


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="FlashAttention is installed")
def test_flash_attention_is_selectable_and_asks_for_its_package(make_model: MakeModel, tmp_path: Path) -> None:
    """Not "MGM does not support it": the package is all that is missing."""
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ImportError, match="package for FlashAttention2 doesn't seem to be installed"):
        AutoModelForImageTextToText.from_pretrained(
            tmp_path, attn_implementation="flash_attention_2", dtype=torch.bfloat16
        )


@torch.no_grad()
def test_parts_offloaded_to_disk_give_the_same_numbers(model: MGMForConditionalGeneration, tmp_path: Path) -> None:
    """`device_map="auto"` under a memory limit: whole blocks stay together, weights come when their module is
    called.
    """
    model.save_pretrained(tmp_path / "model")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    placed = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": size // 3}, offload_folder=tmp_path / "disk"
    ).eval()
    places = placed.hf_device_map
    assert set(places.values()) == {"cpu", "disk"}
    assert not any(f"{name}." in place for place in places for name in ("uni_key", "layers.0", "blocks.0"))
    data = batch(model)
    torch.testing.assert_close(placed(**data).logits, model(**data).logits, atol=1e-5, rtol=1e-5)
    parts = dict.fromkeys(["lm_head", *(f"model.{name}" for name, _ in model.model.named_children())], "cpu")
    parts |= {"model.uni_key": "disk", "model.uni_value": "disk"}  # mining reads their weights without calling them
    placed = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", device_map=parts, offload_folder=tmp_path / "disk2"
    ).eval()
    assert placed.model.uni_key.proj.weight.is_meta and not placed.model.uni_key.foldable_on(torch.device("cpu"))
    torch.testing.assert_close(placed(**data).logits, model(**data).logits, atol=1e-4, rtol=1e-4)


def test_device_map_places_every_part(model: MGMForConditionalGeneration, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    placed = AutoModelForImageTextToText.from_pretrained(tmp_path, device_map={"": "cpu"}).eval()
    torch.testing.assert_close(placed(**batch(placed)).logits, model(**batch(model)).logits)


def test_default_configuration_is_a_model(tmp_path: Path) -> None:
    MGMConfig().save_pretrained(tmp_path)
    assert MGMConfig.from_pretrained(tmp_path).num_image_tokens > 0
