"""The engine's own layers are transformers' layers; float8 products and Triton kernels stay as near as their bits let
them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import GELUActivation

from pipelines.blip2.engine import BlipCaptioner, Request
from pipelines.blip2.ops import Product, Rows, add_norm, quantize
from pipelines.caption.config import CaptionConfig
from pipelines.errors import UserError


def test_the_tower_is_transformers_bit_for_bit(blip2: Path) -> None:
    engine = BlipCaptioner(blip2, CaptionConfig())
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = engine.model.vision_model(pixel_values=pixels).last_hidden_state
        assert torch.equal(engine._tower(pixels), wanted)


def test_products_in_float8_are_near() -> None:
    """Row-wise scales on both sides: a few percent of a product of random numbers, rows of any size and length."""
    torch.manual_seed(0)
    x, layer, norm = torch.randn(5, 7, 96), nn.Linear(96, 64), nn.LayerNorm(96)
    x[0] *= 1000  # one row's size must not cost another its bits
    x, layer, norm = x.bfloat16(), layer.bfloat16(), norm.bfloat16()
    eight = Product.of(layer, fp8=True)
    total, rows = add_norm(x, x, norm, fp8=True)
    assert torch.equal(total, x + x) and isinstance(rows, Rows)
    cases = [
        (eight(x), layer(x)),
        (eight(rows), layer(norm(x + x))),
        (eight.activated(x, GELUActivation()), F.gelu(layer(x))),
    ]
    for got, wanted in cases:
        if isinstance(got, Rows):
            got = got.values.float() * got.scale_M1.view(*got.values.shape[:-1], 1)
        assert got.shape == wanted.shape
        apart = (got.float() - wanted.float()).norm(dim=-1) / wanted.float().norm(dim=-1)
        assert 1e-3 < apart.max() < 0.1
    assert torch.equal(quantize(torch.zeros(2, 8)).values.float(), torch.zeros(2, 8))


def test_the_engine_captions_in_float8(blip2: Path, ending: Path) -> None:
    """Nearly what bfloat16 says; another dtype, and a language model that has no such products, are refused."""
    noise = np.random.default_rng(5).integers(0, 256, (24, 3, 32, 32), dtype=np.uint8)
    features, tokens = [], []
    for products in ("fp8", "dtype"):
        config = CaptionConfig(dtype="bfloat16", products=products, max_new_tokens=6, batch_size=8)
        engine = BlipCaptioner(blip2, config)
        with torch.inference_mode():
            features.append(engine.features(torch.from_numpy(noise)).float().flatten(1))
        tokens.append(engine.generate(Request(image) for image in noise))
    assert 0.9 < F.cosine_similarity(*features).min() < 1
    assert sum(a[0][0] == b[0][0] for a, b in zip(*tokens, strict=True)) >= 18
    with pytest.raises(UserError, match=r"products: fp8 needs caption\.dtype: bfloat16"):
        CaptionConfig(products="fp8", dtype="float32")
    with pytest.raises(UserError, match="products must be dtype or fp8"):
        CaptionConfig(products="int4")
    decided = [CaptionConfig(dtype="bfloat16", products=products).decides() for products in ("fp8", "dtype")]
    assert decided[0] == decided[1] | {"products": "fp8"}, "captions made so are another run"


_KERNELS = """
import torch, torch.nn.functional as F
from pipelines.blip2 import kernels
cuda = torch.cuda.is_available()
torch.set_default_device("cuda" if cuda else "cpu")
torch.manual_seed(0)
rows, heads, size, length = 5, 4, 24, 48
qkv, cache = torch.randn(rows, 3, heads, size), torch.randn(7, length, 2, heads, size)
places, columns, other = torch.tensor([0, 1, 16, 33, 47]), torch.arange(length), cache.clone()
got = kernels.attend_step(qkv, cache, places, 0.2)
other[torch.arange(rows), places] = qkv[:, 1:]
assert torch.equal(cache, other), "a row's key and value at its position, and nothing else"
k, v = other[:rows].double().permute(2, 0, 3, 1, 4)
mask = (columns <= places[:, None])[:, None, None]
wanted = F.scaled_dot_product_attention(qkv[:, 0, :, None].double(), k, v, attn_mask=mask, scale=0.2).flatten(1)
torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-5)

prefix, source, slots = torch.randn(3, 11, 3, heads, size), torch.tensor([0, 0, 2, 1]), torch.tensor([6, 1, 0, 3])
kernels.store_prefix(prefix, cache, source, slots)
other[slots, :11] = prefix[source, :, 1:]
assert torch.equal(cache, other)

x, y, norm = torch.randn(6, 100), torch.randn(6, 100), torch.nn.LayerNorm(100)
torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
total, normed, _ = kernels.add_norm(x, y, norm, False)
assert torch.equal(total, x + y)
torch.testing.assert_close(normed, norm(x + y), atol=1e-5, rtol=1e-5)
if cuda:  # the interpreter does not round to float8 as a GPU does
    eight, scale = kernels.add_norm(x, y, norm, True)[1:]
    torch.testing.assert_close(eight.float() * scale, norm(x + y), atol=0.1, rtol=0.13)
    for activation, torchs in ((kernels.NONE, torch.clone), (kernels.GELU, F.gelu), (kernels.RELU, F.relu)):
        eight, scale = kernels.quantize(x, activation)
        torch.testing.assert_close(eight.float() * scale, torchs(x), atol=0.02, rtol=0.13)
"""


@pytest.mark.heavy
def test_kernels_compute_what_torch_does() -> None:
    """On a GPU as they are, elsewhere by Triton's interpreter, where Triton is."""
    pytest.importorskip("triton")
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    root = str(Path(__file__).resolve().parents[3])
    run = subprocess.run(
        [sys.executable, "-c", _KERNELS],
        env=os.environ | interpreted | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
