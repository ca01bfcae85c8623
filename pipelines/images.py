"""Decoding images that come from anywhere: every Pillow mode, EXIF orientation, and a short reason for every file that
is no picture.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.storage import RemotePath, is_remote

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 100_000_000
"""A decompression bomb is refused from its header, before any pixel is decoded. Larger than any camera's picture of
today."""


class BadImage(Exception):
    """The bytes are no usable picture; the text is a short reason that becomes the record's `error`."""


def read_bytes(path: Path | str) -> bytes:
    """Encoded bytes of an image file, local or at an address that `pipelines.storage` reads.

    Raises:
        BadImage: missing, unreadable or empty.
    """
    try:
        data = RemotePath(str(path)).read_bytes() if is_remote(path) else Path(path).read_bytes()
    except FileNotFoundError:
        raise BadImage(f"missing file: {path}") from None
    except OSError as error:
        raise BadImage(f"unreadable file: {str(path)[:200]} ({_reason(error)})") from None
    except ValueError as error:  # a zero byte in the name
        raise BadImage(f"unreadable file: {str(path)[:200]!r} ({error})") from None
    if not data:
        raise BadImage(f"empty file: {path}")
    return data


def _reason(error: OSError) -> str:
    """A storage system's errors have no errno, but a text that ends with what happened."""
    return error.strerror or str(error).splitlines()[0][:200]


def decode(data: bytes, *, max_side: int | None = None) -> Image:
    """Decode to an RGB picture, upright.

    Palette, CMYK, grey, 16-bit and transparent pictures become RGB (transparency over white); an animation gives its
    first frame. `max_side` lets the JPEG decoder skip detail that a later resize would throw away (Pillow's draft
    mode): the result is at least that large on its short side when the file was.

    Raises:
        BadImage: not an image, truncated, or more than `MAX_PIXELS`.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not data:
        raise BadImage("empty file")
    try:
        with warnings.catch_warnings():
            # bombs are judged below by our own limit; odd EXIF is not the user's concern
            warnings.simplefilter("ignore")
            picture = Image.open(io.BytesIO(data))
            if picture.format == "EPS":
                raise BadImage("not an image (PostScript is a program, and captune runs none that comes with data)")
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise BadImage(f"too large: {width}x{height} pixels (limit {MAX_PIXELS:,})")
            if max_side is not None:
                picture.draft("RGB", (max_side, max_side))
            picture.load()
            ImageOps.exif_transpose(picture, in_place=True)  # it would copy upright pictures too
            return _to_rgb(picture)
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage("not an image") from None
    except Image.DecompressionBombError:
        raise BadImage(f"too large (limit {MAX_PIXELS:,} pixels)") from None
    except Exception as error:
        raise BadImage(f"broken image: {type(error).__name__}: {str(error)[:120]}") from None


def _to_rgb(picture: Image) -> Image:
    from PIL import Image

    if picture.mode == "RGB":
        return picture
    if picture.mode[0] in "IF":
        picture = _to_grey(picture)
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        canvas = Image.new("RGB", rgba.size, (255, 255, 255))
        canvas.paste(rgba, mask=rgba.getchannel("A"))
        return canvas
    return picture.convert("RGB")


def _to_grey(picture: Image) -> Image:
    """Pillow clips 16-bit, 32-bit and float pixels to 8 bits, which makes X-rays and depth maps white; scale their
    range instead.

    16-bit files say what their range is. Wider ones do not, so their brightest pixel decides between 0..1, 0..255 and
    0..65535.
    """
    floating, brightest = picture.mode == "F", 65535.0
    if picture.mode in ("I", "F"):
        picture = picture.convert("F")
        brightest = max(float(value) for value in picture.getextrema())  # type: ignore[arg-type]
    scale = 255.0 if brightest <= 1 and floating else 1.0 if brightest <= 255 else 1 / 256
    return picture.convert("F").point(lambda value: value * scale).convert("L")
