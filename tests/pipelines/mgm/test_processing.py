"""Preprocessing as the original does it, the processor's text side, and bad input."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, CLIPImageProcessorPil, processing_utils

from pipelines.mgm.image_processing import MGMImageProcessor
from pipelines.mgm.modeling import MGMForConditionalGeneration
from pipelines.mgm.processing import MGMProcessor

from .conftest import chat, noise_image

MEAN_COLOUR = (122, 116, 104)
IMAGES = [noise_image(0, 50, 40), noise_image(1, 30, 90), noise_image(2, 64, 64), noise_image(3, 301, 200)]


def padded(image: Image.Image) -> Image.Image:
    longer = max(image.size)
    canvas = Image.new("RGB", (longer, longer), MEAN_COLOUR)
    canvas.paste(image, ((longer - image.width) // 2, (longer - image.height) // 2))
    return canvas


def original(image: Image.Image, size: int, size_aux: int, grid: int, whole: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """One image the original's way: transformers' CLIP processor at `size_aux`, then bilinear."""
    clip = CLIPImageProcessorPil(size={"shortest_edge": size_aux}, crop_size={"height": size_aux, "width": size_aux})
    aux = clip(padded(image), return_tensors="pt")["pixel_values"]
    small = F.interpolate(aux, size=[size * grid] * 2, mode="bilinear", align_corners=False)
    if grid == 1:
        return small[0], aux[0]
    views = [
        small[0, :, row * size : (row + 1) * size, column * size : (column + 1) * size]
        for row in range(grid)
        for column in range(grid)
    ]
    if whole:
        views.append(F.interpolate(small, size=[size] * 2, mode="bilinear", align_corners=False)[0])
    return torch.stack(views), aux[0]


@pytest.mark.parametrize(("grid", "whole"), [(1, False), (2, False), (2, True)])
def test_pixels_equal_the_originals(grid: int, whole: bool) -> None:
    processor = MGMImageProcessor(image_size=32, image_size_aux=128, image_grid=grid, image_global=whole)
    out = processor(IMAGES, return_tensors="pt")
    for index, image in enumerate(IMAGES):
        views, aux = original(image, 32, 128, grid, whole)
        torch.testing.assert_close(out["pixel_values_aux"][index], aux, atol=1e-6, rtol=0)
        torch.testing.assert_close(out["pixel_values"][index], views, atol=1e-6, rtol=0)


def test_resize_and_normalize_are_the_two_halves_of_a_call() -> None:
    processor = MGMImageProcessor(image_size=32, image_size_aux=64)
    pixels = processor.resize(IMAGES)
    assert pixels.dtype == torch.uint8 and pixels.shape == (4, 3, 64, 64)
    whole = processor(IMAGES, device="cpu")
    for half, name in zip(processor.normalize(pixels), ("pixel_values", "pixel_values_aux"), strict=True):
        assert torch.equal(half, whole[name])


def test_every_form_of_an_image_gives_the_same_pixels() -> None:
    processor = MGMImageProcessor(image_size=32, image_size_aux=64)
    image = noise_image(0)
    array = np.array(image)
    forms: list[Any] = [image, array, torch.from_numpy(array).permute(2, 0, 1), image.convert("RGBA")]
    expected = processor(image)["pixel_values_aux"]
    for form in forms:
        assert torch.equal(processor(form)["pixel_values_aux"], expected)
    grey = processor(image.convert("L"))["pixel_values_aux"]
    assert torch.equal(processor(np.array(image.convert("L")))["pixel_values_aux"], grey)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (400, 2), (3, 600)])
def test_extreme_shapes_are_images_like_any_other(size: tuple[int, int]) -> None:
    processor = MGMImageProcessor(image_size=32, image_size_aux=64)
    out = processor(Image.new("RGB", size, (255, 0, 0)))
    assert out["pixel_values"].shape == (1, 3, 32, 32) and torch.isfinite(out["pixel_values"]).all()


def test_without_padding_the_centre_is_cropped() -> None:
    processor = MGMImageProcessor(image_size=32, image_size_aux=64, do_pad=False)
    clip = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    for image in IMAGES:
        expected = clip(image, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(processor(image)["pixel_values_aux"], expected, atol=1e-6, rtol=0)


def test_saved_processor_comes_back_whole(
    model: MGMForConditionalGeneration, processor: MGMProcessor, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, MGMProcessor) and again.tokenizer.padding_side == "left"
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path), MGMImageProcessor)
    messages = chat("What?", noise_image(0))
    kwargs = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    expected, actual = (each.apply_chat_template(messages, **kwargs) for each in (processor, again))
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_placeholders_expand_and_bos_comes_once(processor: MGMProcessor) -> None:
    ids = processor(text="a <image> b <image>", images=[IMAGES[0], IMAGES[1]], return_tensors="pt")["input_ids"][0]
    assert (ids == processor.image_token_id).sum() == 2 * processor.num_image_tokens
    chatted = processor.apply_chat_template(chat("Hi"), tokenize=True, return_dict=True, add_generation_prompt=True)
    assert chatted["input_ids"][0].count(processor.tokenizer.bos_token_id) == 1


def test_placeholders_and_images_must_match(processor: MGMProcessor) -> None:
    with pytest.raises(ValueError, match="same as the number of images"):
        processor(text="<image> <image>", images=[IMAGES[0]])
    with pytest.raises(ValueError, match="no images were passed"):
        processor(text="<image>")
    with pytest.raises(ValueError, match="same as the number of images"):
        processor(text="none", images=[IMAGES[0]])
    with pytest.raises(ValueError, match="row 0 has 2 <image> and 1 images"):
        processor(text=["<image><image>", "none"], images=[[IMAGES[0]], [IMAGES[1]]])


def test_image_token_in_user_text_is_not_an_image(processor: MGMProcessor) -> None:
    """What a user types is text: it neither takes another image's place nor counts as one."""
    kwargs = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    if "sanitize_control_tokens" not in inspect.getsource(processing_utils):  # of an older transformers
        with pytest.raises(ValueError, match="number of images"):
            processor.apply_chat_template(chat("what does <image> mean?", IMAGES[0]), **kwargs)
        return
    out = processor.apply_chat_template(chat("what does <image> mean?", IMAGES[0]), **kwargs)
    assert (out["input_ids"] == processor.image_token_id).sum() == processor.num_image_tokens
    assert "pixel_values" not in processor.apply_chat_template(chat("<image>"), **kwargs)
    with pytest.raises(ValueError, match="tokenize=True"):
        processor.apply_chat_template(chat("say <image>"), tokenize=False)


def test_prompts_over_the_context_length_are_refused(
    model: MGMForConditionalGeneration, processor: MGMProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sees the prompt first says how long it is and what the limit is; nothing is cut off unasked."""
    assert processor.tokenizer.model_max_length == min(2048, model.config.text_config.max_position_embeddings)
    monkeypatch.setattr(processor.tokenizer, "model_max_length", 12)
    fits, long = chat("Hi"), chat("What is written on the sign?", IMAGES[0])
    length = processor.apply_chat_template(fits, tokenize=True, return_dict=True)["input_ids"]
    assert len(length[0]) <= 12
    kwargs = {"tokenize": True, "return_dict": True, "processor_kwargs": {"padding": True}}
    with pytest.raises(ValueError, match=r"prompt 1 is \d\d tokens long with its images, over the context of 12"):
        processor.apply_chat_template([fits, long], **kwargs)


def test_truncation_cuts_text_but_never_an_image(processor: MGMProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "What is written on the sign? " * 5
    whole = processor(text=f"<image>{words}", images=[IMAGES[0]])["input_ids"][0]
    monkeypatch.setattr(processor.tokenizer, "truncation_side", "right")
    kwargs = {"truncation": True, "images": [IMAGES[0]]}
    cut = processor(text=f"<image>{words}", max_length=12, **kwargs)["input_ids"][0]
    assert cut == whole[:12] and cut.count(processor.image_token_id) == processor.num_image_tokens
    with pytest.raises(ValueError, match="Mismatch in `image` token count"):
        processor(text=f"{words}<image>", max_length=12, **kwargs)
    with pytest.raises(ValueError, match="Mismatch in `image` token count"):
        processor(text=f"<image>{words}", max_length=3, **kwargs)


def test_wrong_pixels_are_errors(processor: MGMProcessor) -> None:
    with pytest.raises(ValueError, match="uint8"):
        processor.image_processor(np.zeros((4, 4, 3), dtype=np.float32))
    with pytest.raises(ValueError, match="does not know size"):
        processor.image_processor(IMAGES[0], size=3)


def test_configuration_and_tokenizer_must_agree(model: MGMForConditionalGeneration, processor: MGMProcessor) -> None:
    model.config.image_token_id = 99
    with pytest.raises(ValueError, match="image_token_id is 99"):
        MGMProcessor.from_config(model.config, processor.tokenizer)
