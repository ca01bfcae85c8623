"""Decoding: every kind of picture becomes upright RGB, everything else a short reason, and nothing else ever
escapes.
"""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import images
from pipelines.formats.rows import SUFFIXES
from pipelines.images import BadImage, decode, read_bytes, suffix_of


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


@pytest.fixture
def gradient() -> Image.Image:
    return Image.merge(
        "RGB",
        [
            Image.linear_gradient("L").resize((64, 48)),
            Image.new("L", (64, 48), 30),
            Image.radial_gradient("L").resize((64, 48)),
        ],
    )


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_every_mode_becomes_rgb(gradient: Image.Image, mode: str) -> None:
    source = gradient.convert("L").convert("I").convert("I;16") if mode == "I;16" else gradient.convert(mode)
    picture = decode(encode(source, "TIFF" if mode in ("CMYK", "YCbCr", "I", "F") else "PNG"))
    assert picture.mode == "RGB" and picture.size == (64, 48)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    """A 16-bit grey of half intensity is mid-grey; Pillow's own conversion makes it white."""
    half = Image.frombytes("I;16", (4, 4), struct.pack("<16H", *[32768] * 16))
    assert decode(encode(half, "PNG")).getpixel((0, 0)) == (128, 128, 128)


def test_floats_of_a_picture_are_not_black() -> None:
    """A float TIFF keeps 0..255 (what `convert("F")` writes), and 0..1 (what scientific software writes) is stretched
    to it.
    """
    for value in (200.0, 200 / 255):
        shade = decode(encode(Image.new("F", (4, 4), value), "TIFF")).getpixel((0, 0))
        assert isinstance(shade, tuple) and abs(shade[0] - 200) <= 1


def test_a_few_wild_pixels_do_not_decide_what_is_white() -> None:
    """Infinite, absurd or no number at all: the rest of a depth map looks as it does without them."""
    depth = np.tile(np.linspace(0.1, 0.9, 64, dtype=np.float32), (64, 1))
    clean = np.asarray(decode(encode(Image.fromarray(depth), "TIFF")), np.int16)
    assert clean.max() - clean.min() > 190
    for wild in (np.inf, -np.inf, np.nan, 1e30, 300.0):
        depth[3, 5] = wild
        odd = np.asarray(decode(encode(Image.fromarray(depth), "TIFF")), np.int16)
        assert np.abs(odd - clean).mean() < 0.1


def png_with(whole: bytes, name: bytes, data: bytes, *, wrong: bool = False) -> bytes:
    """A PNG with one more chunk after its header."""
    checksum = zlib.crc32(name + data) ^ wrong
    return whole[:33] + struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum) + whole[33:]


def test_damaged_metadata_cost_no_picture(gradient: Image.Image) -> None:
    """A colour profile of megabytes, compressed text that is a bomb, wrong checksums of either, EXIF that is none; an
    orientation that is whole still counts.
    """
    whole = encode(gradient, "PNG")
    bomb = zlib.compress(bytes(3 << 20))
    for name, data in ((b"iCCP", b"p\0\0" + bomb), (b"zTXt", b"k\0\0" + bomb), (b"eXIf", b"no TIFF")):
        assert decode(png_with(whole, name, data)).tobytes() == decode(whole).tobytes()
    assert decode(png_with(whole, b"iCCP", b"p\0\0" + bomb, wrong=True)).tobytes() == decode(whole).tobytes()
    turned = Image.Exif()
    turned[0x0112] = 6
    for format in ("PNG", "JPEG", "WEBP"):
        assert decode(encode(gradient, format, exif=turned)).size == (48, 64)
        assert decode(encode(gradient, format, exif=b"Exif\0\0II*\0" + b"\xff" * 60)).size == (64, 48)
    clear = Image.new("P", (8, 8), 0)
    clear.putpalette([255, 0, 0])
    kept = decode(png_with(encode(clear, "PNG", transparency=0), b"zTXt", b"k\0\0" + bomb))
    assert kept.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("format", "suffix"),
    [
        ("JPEG", ".jpg"),
        ("PNG", ".png"),
        ("GIF", ".gif"),
        ("BMP", ".bmp"),
        ("TIFF", ".tif"),
        ("WEBP", ".webp"),
        ("AVIF", ".avif"),
        ("JPEG2000", ".jp2"),
        ("PPM", ".ppm"),
        ("ICO", ".ico"),
        ("TGA", ".tga"),
    ],
)
def test_the_ending_is_that_of_the_contents(gradient: Image.Image, format: str, suffix: str) -> None:
    assert suffix_of(encode(gradient, format)) == suffix and suffix in SUFFIXES


def test_transparency_animation_and_orientation(gradient: Image.Image) -> None:
    """Transparent is white, an animation is its first frame, a phone's rotated JPEG stands upright."""
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert decode(encode(clear, "PNG")).getpixel((0, 0)) == (255, 255, 255)
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    assert decode(encode(frames[0], "GIF", save_all=True, append_images=frames[1:])).getpixel((0, 0)) == (255, 0, 0)
    turned = Image.Exif()
    turned[0x0112] = 6
    assert decode(encode(gradient, "JPEG", exif=turned)).size == (48, 64)


def test_draft_keeps_enough_detail() -> None:
    """`max_side` may shrink a JPEG while decoding, never below what was asked for, and leaves small ones alone."""
    large = encode(Image.linear_gradient("L").resize((1600, 1200)).convert("RGB"), "JPEG")
    assert decode(large, max_side=224).size == (400, 300)
    assert decode(large).size == (1600, 1200)
    small = encode(Image.new("RGB", (100, 80)), "JPEG")
    assert decode(small, max_side=224).size == (100, 80)


def test_reasons_are_short_and_sorted(gradient: Image.Image, tmp_path: Path) -> None:
    whole = encode(gradient, "JPEG")
    for data, reason in ((b"", "empty file"), (b"<html>", "not an image"), (whole[: len(whole) // 2], "broken image")):
        with pytest.raises(BadImage, match=reason):
            decode(data)
    (tmp_path / "empty").touch()
    for path, reason in (
        (tmp_path / "no", "missing file"),
        (tmp_path, "unreadable file"),
        (tmp_path / "empty", "empty file"),
    ):
        with pytest.raises(BadImage, match=reason):
            read_bytes(path)
    for name in ("nul\0byte.jpg", "x" * 5000):
        with pytest.raises(BadImage):
            read_bytes(name)


def test_bombs_are_refused_from_their_header(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few kilobytes that would become 400 megapixels cost neither time nor memory; both our limit and Pillow's have a
    reason.
    """
    for side in (10_001, 20_000):
        with pytest.raises(BadImage, match="too large"):
            decode(encode(Image.new("1", (side, side)), "PNG"))
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(BadImage, match="too large: 20x20"):
        decode(encode(Image.new("RGB", (20, 20)), "BMP"))


@pytest.mark.parametrize(
    "format",
    ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "PCX", "ICO", "JPEG2000", "DDS", "SGI", "ICNS", "AVIF"],
)
def test_damage_never_raises_anything_else(gradient: Image.Image, format: str) -> None:
    """Random damage to every format Pillow writes ends in a picture or a `BadImage`: one file can never end a job."""
    Image.init()
    if format not in Image.SAVE:
        pytest.skip(f"this Pillow cannot write {format}")
    whole = encode(gradient.resize((64, 64)), format)
    choose = random.Random(format)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(choose.choice((1, 3, 20))):
            data[choose.randrange(min(len(data), choose.choice((64, 1 << 20))))] = choose.randrange(256)
        del data[choose.choice((len(data), choose.randrange(len(data)))) :]
        try:
            assert decode(bytes(data)).mode == "RGB"
        except BadImage as problem:
            assert 0 < len(str(problem)) < 200
