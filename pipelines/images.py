"""Decoding images that come from anywhere: every Pillow mode, EXIF orientation, and a short reason for every file that
is no picture.
"""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.storage import RemotePath, is_remote

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 100_000_000
"""A decompression bomb is refused from its header, before any pixel is decoded. Larger than any camera's picture of
today."""

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_ASIDE = {b"tRNS", b"eXIf"}
"""Chunks of a PNG that say how its pixels look, beside those without which it is none (their names begin with a capital
letter)."""
_ORIENTATION = 0x0112
_ABSURD_SHARE = 0.001
"""Of the pixels of a picture whose range nobody states, so many of the brightest do not decide what is white."""
_MAGIC = (
    (b"\xff\xd8", ".jpg"),
    (b"\x89PNG", ".png"),
    (b"GIF8", ".gif"),
    (b"BM", ".bmp"),
    (b"II*\0", ".tif"),
    (b"MM\0*", ".tif"),
    (b"P4", ".pbm"),
    (b"P5", ".pgm"),
    (b"P6", ".ppm"),
    (b"\0\0\0\x0cjP  ", ".jp2"),
)
_ENDINGS = {"JPEG2000": ".jp2", "TIFF": ".tif", "PPM": ".pnm"}


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
    first frame. Metadata that are damaged or huge cost no picture whose pixels are whole. `max_side` lets the JPEG
    decoder skip detail that a later resize would throw away (Pillow's draft mode): the result is at least that large on
    its short side when the file was.

    Raises:
        BadImage: not an image, truncated, or more than `MAX_PIXELS`.
    """
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise BadImage("empty file")
    try:
        with warnings.catch_warnings():
            # bombs are judged below by our own limit; odd EXIF is not the user's concern
            warnings.simplefilter("ignore")
            picture = Image.open(io.BytesIO(_pixels_of_png(data) if data.startswith(_PNG) else data))
            if picture.format == "EPS":
                raise BadImage("not an image (PostScript is a program, and captune runs none that comes with data)")
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise BadImage(f"too large: {width}x{height} pixels (limit {MAX_PIXELS:,})")
            if max_side is not None:
                picture.draft("RGB", (max_side, max_side))
            picture.load()
            return _to_rgb(_upright(picture))
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

    16-bit files say what their range is. Wider ones do not, so their brightest pixels decide between 0..1, 0..255 and
    0..65535; a few that are infinite or absurd do not.
    """
    from PIL import Image

    if picture.mode not in ("I", "F"):
        return picture.convert("F").point(lambda value: value / 256).convert("L")
    import numpy as np

    values = np.asarray(picture, np.float32)
    finite = values[np.isfinite(values)]
    brightest = np.quantile(finite, 1 - _ABSURD_SHARE, method="lower") if finite.size else 0.0
    scale = 255.0 if brightest <= 1 and picture.mode == "F" else 1.0 if brightest <= 255 else 1 / 256
    grey = np.nan_to_num(values, nan=0.0, posinf=np.inf, neginf=0.0) * scale
    return Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8), "L")


def _upright(picture: Image) -> Image:
    """As the camera's orientation says; EXIF that is damaged says nothing."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        turn = turns.get(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # strangers' bytes: Pillow's parser raises whatever they make it raise
        turn = None
    return picture if turn is None else picture.transpose(turn)


def _pixels_of_png(data: bytes) -> bytes:
    """A PNG without what is not its pixels: Pillow refuses it as a whole for a large colour profile, a compressed text
    or a wrong checksum of either.
    """
    kept, start, at = [], 0, len(_PNG)
    while at + 12 <= len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        end = at + 12 + size
        if not name[:1].isupper() and name not in _PNG_ASIDE:
            kept.append(data[start:at])
            start = end
        at = end
    return b"".join([*kept, data[start:]]) if kept else data


def suffix_of(data: bytes) -> str:
    """Ending of the name that a picture's contents ask for, e.g. `.jpg`.

    Raises:
        BadImage: no picture.
    """
    from PIL import Image

    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ".webp"
    if data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis"):
        return ".avif"
    if known := next((suffix for magic, suffix in _MAGIC if data.startswith(magic)), ""):
        return known
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            name = Image.open(io.BytesIO(data)).format or ""
    except Exception:  # as in `decode`
        raise BadImage("not an image") from None
    return _ENDINGS.get(name, f".{name.lower()}")
