"""A tiny random MGM that answers different things to different questions, and one Ray cluster for the module that
needs it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random MGM (0.1M parameters) with a byte-level tokenizer and the Gemma chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import CLIPVisionConfig, GemmaConfig, PreTrainedTokenizerFast

    from pipelines.mgm.configuration import MGMConfig, MGMConvNextConfig
    from pipelines.mgm.modeling import MGMForConditionalGeneration
    from pipelines.mgm.processing import MGMProcessor

    torch.set_num_threads(1)
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<image>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(special + letters)}, [], unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = MGMConfig(
        text_config=GemmaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            intermediate_size=64,
            max_position_embeddings=512,
            initializer_range=0.4,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
        ),
        vision_config_aux=MGMConvNextConfig(
            hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_scale_init_value=1.0
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_size_aux=64,
    )
    model = MGMForConditionalGeneration(config).eval()
    directory = tmp_path_factory.mktemp("tiny") / "mgm"
    model.save_pretrained(directory)
    MGMProcessor.from_config(config, tokenizer).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def picture() -> Callable[[int], bytes]:
    """JPEG bytes of a seeded noise picture; sizes and colours differ from seed to seed."""

    def make(seed: int) -> bytes:
        import numpy as np
        from PIL import Image

        random = np.random.default_rng(seed)
        height, width = random.integers(40, 90, size=2)
        pixels = random.integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).resize((int(width), int(height))).save(stream, "JPEG", quality=95)
        return stream.getvalue()

    return make


@pytest.fixture(scope="session")
def data_url() -> Callable[[bytes], str]:
    """`data:` URL of encoded picture bytes."""
    return lambda data: "data:image/jpeg;base64," + base64.b64encode(data).decode()


@pytest.fixture(scope="session")
def chat_body(data_url: Callable[[bytes], str]) -> Callable[..., dict[str, Any]]:
    """A valid request body; keyword arguments replace or add fields."""

    def make(text: str = "What is this?", *images: bytes, **fields: Any) -> dict[str, Any]:
        parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
        message = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
        return {"model": "captune", "messages": [message], "temperature": 0, "max_tokens": 8} | fields

    return make
