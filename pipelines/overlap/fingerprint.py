"""A picture in few bytes, so that a copy is known whatever its size, format and quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

SIDE = 32
BITS = 64
"""Of the hash: whether each of the lowest frequencies (8 by 8) is above their median, as Zauner 2010 (Implementation
and Benchmarking of Perceptual Image Hash Functions, section 3.2.1) takes them; the mean brightness is none of them."""
_LOOKED_AT = 2 * SIDE
_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Fingerprint:
    """`hash`: `BITS` bits; `small`: uint8 [SIDE, SIDE, 3]."""

    hash: int
    small: np.ndarray


def fingerprint(data: bytes) -> Fingerprint:
    """Of an encoded picture.

    Raises:
        BadImage: it is none.
    """
    import numpy as np
    from PIL import Image
    from scipy.fft import dctn

    from pipelines.images import decode

    picture = decode(data, max_side=_LOOKED_AT).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    small = np.asarray(picture)
    waves = dctn(small.astype(np.float32).mean(axis=2), norm="ortho")[:8, :8].ravel()
    waves[0] = 0.0
    bits = waves > np.median(waves[1:])
    return Fingerprint(int(np.packbits(bits).view(">u8")[0]), small)


class Pictures:
    """Fingerprints to find copies of. P pictures.

    Args:
        distance, correlation: see `OverlapConfig`.
    """

    def __init__(self, prints: Sequence[Fingerprint], distance: int, correlation: float) -> None:
        self.prints, self.distance, self.correlation = prints, distance, correlation

    @cached_property
    def _hashes_P(self) -> np.ndarray:
        import numpy as np

        return np.array([each.hash for each in self.prints], dtype=np.uint64)

    @cached_property
    def _vectors_PV(self) -> np.ndarray:
        import numpy as np

        return _vectors(np.stack([each.small for each in self.prints])) if self.prints else np.empty((0, 0))

    def copies(self, found: Sequence[Fingerprint]) -> list[list[tuple[int, int, float]]]:
        """For each picture its copies among these: number, bits that differ and correlation, the likest first."""
        import numpy as np

        if not self.prints or not found:
            return [[] for _ in found]
        step = max(1, _AT_ONCE // len(self.prints))
        lists: list[list[tuple[int, int, float]]] = []
        for start in range(0, len(found), step):
            part = found[start : start + step]
            hashes_F = np.array([each.hash for each in part], dtype=np.uint64)
            differ_FP = np.bitwise_count(hashes_F[:, None] ^ self._hashes_P[None, :])
            vectors_FV = _vectors(np.stack([each.small for each in part]))
            for vector_V, differ_P in zip(vectors_FV, differ_FP, strict=True):
                near = np.flatnonzero(differ_P <= self.distance)
                alike = self._vectors_PV[near] @ vector_V
                chosen = [(int(at), int(differ_P[at]), float(c)) for at, c in zip(near, alike, strict=True)]
                lists.append(sorted((c for c in chosen if c[2] >= self.correlation), key=lambda c: -c[2]))
        return lists


def _vectors(small_NSSC: np.ndarray) -> np.ndarray:
    """float32 [N, V] of length 1, each channel without its mean; zeros of a picture of one colour."""
    import numpy as np

    values = small_NSSC.astype(np.float32)
    values -= values.mean(axis=(1, 2), keepdims=True)
    flat = values.reshape(len(values), -1)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    return np.divide(flat, length, out=np.zeros_like(flat), where=length > 1)
