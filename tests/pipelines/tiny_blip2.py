"""A tiny random BLIP-2 and a bag of pictures, good and bad."""

from __future__ import annotations

import io
import random
from pathlib import Path


def make_blip2(directory: Path, *, image_token: bool = True, language: str = "opt", ends: int | list[int] = 1) -> Path:
    """A genuine BLIP-2 checkpoint of a few hundred kilobytes; weights are random but wide enough apart to give varied
    captions.

    With many end tokens, captions end at many lengths.
    """
    import torch
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    from tests.tiny_tokenizers import byte_level

    tokenizer = byte_level("</s>", "</s>", "<pad>", ["<image>"] if image_token else [])
    tokenizer.padding_side = "left"
    config = Blip2Config(
        vision_config=dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        ),
        qformer_config=dict(
            vocab_size=8,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            encoder_hidden_size=32,
            cross_attention_frequency=1,
        ),
        text_config=_LANGUAGE_MODELS[language] | dict(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=ends),
        num_query_tokens=4,
        image_token_index=3,
    )
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    model.save_pretrained(directory)
    if image_token:
        images = BlipImageProcessorPil(size={"height": 32, "width": 32})
        Blip2Processor(images, tokenizer, num_query_tokens=4).save_pretrained(directory)
    else:
        BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return directory


_LANGUAGE_MODELS: dict[str, dict[str, object]] = {
    "opt": dict(
        model_type="opt",
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    ),
    "t5": dict(
        model_type="t5",
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        pad_token_id=0,
    ),
}


def picture(seed: int, size: tuple[int, int] = (80, 60)) -> bytes:
    """A JPEG of coloured boxes, different for every seed."""
    from PIL import Image, ImageDraw

    choose = random.Random(seed)
    image = Image.new("RGB", size, tuple(choose.randrange(256) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = choose.randrange(size[0]), choose.randrange(size[1])
        draw.rectangle(
            (x, y, x + choose.randrange(8, 40), y + choose.randrange(8, 40)),
            tuple(choose.randrange(256) for _ in range(3)),
        )
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=90)
    return stream.getvalue()
