"""Tiny MGM models with random weights, and the reference case that the original code computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, GemmaConfig, PreTrainedTokenizerFast

from pipelines.mgm.configuration import MGMConfig, MGMConvNextConfig
from pipelines.mgm.modeling import MGMForConditionalGeneration
from pipelines.mgm.processing import MGMProcessor
from tests.pipelines.tiny_parts import text_sizes
from tests.tiny_tokenizers import tokenizer_for

DATA = Path(__file__).parent / "data"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def data() -> Path:
    return DATA


@pytest.fixture(scope="session")
def reference() -> dict[str, torch.Tensor]:
    return load_file(DATA / "mgm_gemma" / "expected.safetensors")


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference checkpoint as a Hugging Face directory."""
    from pipelines.mgm.convert import convert_checkpoint

    output = tmp_path_factory.mktemp("converted") / "model"
    convert_checkpoint(DATA / "mgm_gemma" / "checkpoint", output, clip=DATA / "openai-clip-tiny")
    return output


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer_for("gemma")


def tiny_config(tokenizer: PreTrainedTokenizerFast, **kwargs: Any) -> MGMConfig:
    text = kwargs.pop("text_config", None) or GemmaConfig(**text_sizes(tokenizer))
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=16
    )
    aux = MGMConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], layer_scale_init_value=0.5)
    return MGMConfig(
        text_config=text,
        vision_config=vision,
        vision_config_aux=aux,
        **{"image_token_id": tokenizer.convert_tokens_to_ids("<image>"), "image_size_aux": 64} | kwargs,
    )


def randomize(model: torch.nn.Module) -> None:
    """Weights large enough that images and tokens visibly matter; fresh initialization is nearly constant."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.2 if parameter.ndim > 1 else 0.3
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise + (1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0))


@pytest.fixture
def make_model(tokenizer: PreTrainedTokenizerFast) -> Callable[..., MGMForConditionalGeneration]:
    def make(**kwargs: Any) -> MGMForConditionalGeneration:
        model = MGMForConditionalGeneration(tiny_config(tokenizer, **kwargs)).eval()
        randomize(model)
        model.tie_weights()
        # Untrained models like the end token; these tests want full-length answers.
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        return model

    return make


@pytest.fixture
def model(make_model: Callable[..., MGMForConditionalGeneration]) -> MGMForConditionalGeneration:
    return make_model()


@pytest.fixture
def processor(model: MGMForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> MGMProcessor:
    return MGMProcessor.from_config(model.config, tokenizer)


def noise_image(seed: int, width: int = 50, height: int = 40) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height // 10, width // 10, 3), generator=generator, dtype=torch.uint8).numpy()
    return Image.fromarray(pixels).resize((width, height))


def chat(text: str, *images: Image.Image) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def load_masks() -> list[dict[str, Any]]:
    """Conversations with the original's tokens and labels; `max_length` where it is not 2048."""
    files = ("masks.json", "odd_masks.json")
    return [case for name in files for case in json.loads((DATA / name).read_text())]
