"""What runs in Ray's workers: decoding tasks, and the actor that holds one model replica."""

from __future__ import annotations

import io
import json
import math
import random
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.blip2.pixels import PixelSpec
from pipelines.blip2.shared import SharedEngine
from pipelines.caption.config import CaptionConfig
from pipelines.caption.index import content
from pipelines.caption.results import result_schema
from pipelines.formats import error_kind
from pipelines.images import BadImage, decode
from pipelines.storage import is_remote

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from pipelines.blip2.engine import BlipCaptioner, Captioned

_FETCHERS = 16
_EXAMPLES = 5
"""Pictures of each batch that a person may see on the contact sheet; no more, as encoding them takes the engine's
cores."""


class GuardTripped(Exception):
    """A guard's limit is passed; ends the pass from inside, as only a failing task can."""


def decode_batch(table: pa.Table, spec: PixelSpec, prompt_key: str = "") -> pa.Table:
    """Index rows -> `sample_id`, `caption`, `prompt` and `pixels` (uint8 bytes of (3, H, W)), or `error` where there is
    no picture.
    """
    import numpy as np

    rows = [row for row in table.to_pylist() if not row["skip"]]
    pixels = np.zeros((len(rows), 3, spec.height, spec.width), np.uint8)
    decode_row = partial(_decode_row, spec=spec, prompt_key=prompt_key)
    if any(is_remote(row["image_uri"]) for row in rows):  # waiting for a far store is done together
        with ThreadPoolExecutor(_FETCHERS) as pool:
            decoded = list(pool.map(decode_row, rows, pixels))
    else:
        decoded = list(map(decode_row, rows, pixels))
    return _pixel_table(decoded, pixels)


def _decode_row(row: dict[str, Any], pixels: np.ndarray, spec: PixelSpec, prompt_key: str) -> dict[str, Any]:
    """Fill in `pixels`, uint8 (3, H, W), and say the rest."""
    found = {"sample_id": row["sample_id"], "caption": row["caption"]}
    try:
        found["prompt"] = _own_prompt(row, prompt_key)
        pixels[:] = spec.pixels(decode(content(row), max_side=spec.draft_side))
        return found
    except BadImage as problem:
        return found | {"error": f"{problem} ({row['where']})"}


def _pixel_table(rows: list[dict[str, Any]], pixels: np.ndarray) -> pa.Table:
    """Rows beside their pixels, which are not copied; null where a row has an error."""
    import pyarrow as pa

    columns = ("sample_id", "caption", "prompt", "error")
    table = pa.Table.from_pylist(rows, schema=pa.schema([(name, pa.string()) for name in columns]))
    valid = pa.array([row.get("error") is None for row in rows], pa.bool_()).buffers()[1]
    cells = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(math.prod(pixels.shape[1:])), len(rows), [valid, pa.py_buffer(pixels)]
    )
    return table.append_column("pixels", cells)


def _pixels_of(table: pa.Table, spec: PixelSpec) -> np.ndarray:
    """uint8 (B, 3, H, W) of a `_pixel_table`, not copied either."""
    import numpy as np

    column = table["pixels"].combine_chunks()
    flat = np.frombuffer(column.buffers()[1], np.uint8, len(column) * spec.row_bytes, column.offset * spec.row_bytes)
    return flat.reshape(len(column), 3, spec.height, spec.width)


def _own_prompt(row: dict[str, Any], key: str) -> str | None:
    prompt = json.loads(row["meta"]).get(key) if key else None
    if prompt is None or isinstance(prompt, str):
        return prompt
    raise BadImage(f"bad row: its prompt '{key}' is a {type(prompt).__name__}, not a text")


def load_engine(model: Path, config: CaptionConfig, *, on_gpu: bool) -> BlipCaptioner:
    """The engine as a replica runs it: on the GPU that it sees, or with the threads that the recipe gives it."""
    import torch
    from transformers.utils import logging as transformers_logging

    from pipelines.blip2.engine import BlipCaptioner

    transformers_logging.disable_progress_bar()
    if not on_gpu:
        torch.set_num_threads(max(1, round(config.cpus_per_actor)))
    return BlipCaptioner(model, config, "cuda" if on_gpu else "cpu")


class Captioner:
    """One model replica in a Ray actor.

    Several calls run at once, in threads of their own, and share the engine: while one batch is decoded, awaited or
    handed on, the images of another are in the slots.

    Args:
        tally: handle of the `Tally` actor that counts this run.
    """

    def __init__(self, model: Path, spec: PixelSpec, config: CaptionConfig, tally: Any) -> None:
        self._engine = SharedEngine(load_engine(model, config, on_gpu=config.gpus_per_actor > 0))
        self._spec = spec
        self._tally, self._verdict = tally, None

    def __call__(self, table: pa.Table) -> pa.Table:
        """`decode_batch`'s table -> results.

        Raises:
            GuardTripped: what this run has seen so far passes a limit of the recipe.
        """
        return self._begin(table, self._engine.ticket())()

    def _begin(self, table: pa.Table, ticket: int) -> Callable[[], pa.Table]:
        """Hand `decode_batch`'s table to the engine; the function that waits for its results."""
        from pipelines.blip2.engine import Request

        self._heed()
        rows = table.drop_columns("pixels").to_pylist()
        good = [
            (row, image) for row, image in zip(rows, _pixels_of(table, self._spec), strict=True) if row["error"] is None
        ]
        coming = self._engine.submit(
            [Request(image, row["sample_id"], row["prompt"], row["caption"]) for row, image in good], ticket
        )
        return lambda: self._end(rows, good, coming.result())

    def _end(
        self, rows: list[dict[str, Any]], good: list[tuple[dict[str, Any], np.ndarray]], captioned: list[Captioned]
    ) -> pa.Table:
        import pyarrow as pa

        for (row, _), said in zip(good, captioned, strict=True):
            row |= {"candidates": said.candidates, "scores": said.scores, "recaption": said.chosen, "error": said.error}
        self._report(rows, good)
        return pa.Table.from_pylist(rows, schema=result_schema())

    def _report(self, rows: list[dict[str, Any]], good: list[tuple[dict[str, Any], np.ndarray]]) -> None:
        """Tell the tally; its answer is read before the next batch, so that nothing waits for it here."""
        shown = random.sample(good, min(_EXAMPLES, len(good)))
        examples = [(_thumbnail(image), row["caption"], row["recaption"]) for row, image in shown]
        errors = [(error_kind(row["error"]), row["error"]) for row in rows if row["error"] is not None]
        texts = [row["recaption"] for row, _ in good if row["recaption"] is not None]
        self._verdict = self._tally.add.remote(texts, errors, examples)

    def _heed(self) -> None:
        import ray

        if self._verdict is None:
            return
        try:
            reason = ray.get(self._verdict)
        except ray.exceptions.RayActorError:
            return  # the tally's process died; it is started again, and captions matter more than counts
        if reason:
            raise GuardTripped(reason)


class DecodingCaptioner(Captioner):
    """A replica that decodes too, where it shares its cores with whoever else would: pixels never leave its process."""

    def __init__(self, model: Path, spec: PixelSpec, config: CaptionConfig, tally: Any) -> None:
        super().__init__(model, spec, config, tally)
        self._prompt_key, self._rows = config.prompt_key, config.slots_on(config.device)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:  # type: ignore[override]
        """Index rows -> results; the next images are decoded while those before them are captioned.

        Calls that came earlier go first, so that a file is committed, and safe from a kill, as soon as can be.
        """
        ticket = self._engine.ticket()
        begun: deque[Callable[[], pa.Table]] = deque()
        for first in range(0, len(table), self._rows):
            rows = table.slice(first, self._rows)
            begun.append(self._begin(decode_batch(rows, self._spec, self._prompt_key), ticket))
            if len(begun) > 1:
                yield begun.popleft()()
        for end in begun:
            yield end()


def _thumbnail(pixels: np.ndarray) -> bytes:
    """uint8 (3, H, W) -> JPEG."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(stream, "JPEG", quality=80)
    return stream.getvalue()
