"""Which rows of training data show a benchmark's pictures or hold its questions' words."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipelines.errors import UserError
from pipelines.evaluate.benchmark import CarriesPictures, Question, picture_path
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.registry import open_benchmark
from pipelines.formats import open_dataset
from pipelines.formats.reading import DEFAULT, Reading
from pipelines.images import BadImage, read_bytes
from pipelines.overlap.config import OverlapConfig
from pipelines.overlap.fingerprint import Fingerprint, Pictures, fingerprint
from pipelines.progress import Progress, say
from pipelines.records import holds_records, sample_id, shard_paths
from pipelines.text import words_of

_CHUNK = 256
_WHOLE = 5
"""Words that a short question must have to count as a whole."""


@dataclass
class _Row:
    """A row of training data. `id`: the `sample_id` that its record has, empty where it has none."""

    dataset: str
    where: str
    text: str
    pictures: list[bytes | str]
    caption: str = ""
    id: str = ""
    prints: list[Fingerprint] = field(default_factory=list)
    unreadable: int = 0


@dataclass
class Overlap:
    """`facts` is the JSON; `pictures` holds, for the page, encoded pictures of both sides: (row's, benchmark's)."""

    facts: dict[str, Any]
    pictures: list[tuple[bytes, bytes]] = field(default_factory=list)


COUNTS = ("rows", "pictures", "unreadable", "same_picture", "same_words")
SHOWN = 60
"""Pairs whose pictures the page shows."""


def find(
    datasets: Sequence[str], evaluate: EvaluateConfig, config: OverlapConfig, reading: Reading = DEFAULT
) -> Overlap:
    """Look at every row's pictures and text.

    Args:
        reading: how datasets are read that are no records.

    Returns:
        Facts: `benchmark`, `annotations`, `questions`, `pictures`; `datasets`: for each `path`, `rows`, `pictures`,
        `unreadable`, `same_picture`, `same_words` (rows); `rows`: those with a benchmark's picture, each `dataset`,
        `row`, `sample_id`, `image_id`, `distance`, `correlation`, `questions` (ids), `words` (whether it holds one's
        words, too); `texts`: rows with a question's words alone, each `dataset`, `row`, `sample_id`, `question_id`,
        `words`; `contaminated`: ids of the questions whose picture is trained on.

    Raises:
        UserError: no such dataset or benchmark, or none of the benchmark's pictures can be read.
    """
    benchmark = open_benchmark(evaluate.benchmark)
    questions = benchmark.questions(evaluate)
    with TemporaryDirectory() as scratch:
        images: Path | str = evaluate.images
        if isinstance(benchmark, CarriesPictures):
            benchmark.unpack(evaluate, images := Path(scratch))
        search = _Search(
            questions, {q.image_id: picture_path(benchmark, images, q.image_id) for q in questions}, config
        )
        counts = [search.look(dataset, reading) for dataset in datasets]
    contaminated = {key for row in search.rows for key in row["questions"]}
    facts = {
        "benchmark": evaluate.benchmark,
        "annotations": evaluate.annotations,
        "questions": len(questions),
        "pictures": len(search.ids),
        "datasets": counts,
        "rows": search.rows,
        "texts": search.texts,
        "contaminated": [question.id for question in questions if question.id in contaminated],
    }
    return Overlap(facts, search.shown)


class _Search:
    """A benchmark's pictures and words, and the rows found that share them."""

    def __init__(self, questions: Sequence[Question], paths: dict[str, Path], config: OverlapConfig) -> None:
        self.paths = paths
        self.ids, prints = _benchmark_prints(paths)
        self.pictures = Pictures(prints, config.distance, config.correlation)
        self.words = _Words(questions, config.words)
        self.asked: dict[str, list[str]] = {}
        for question in questions:
            self.asked.setdefault(question.image_id, []).append(question.id)
        self.rows: list[dict[str, Any]] = []
        self.texts: list[dict[str, Any]] = []
        self.shown: list[tuple[bytes, bytes]] = []

    def look(self, dataset: str, reading: Reading) -> dict[str, Any]:
        """Enter a dataset's rows; returns how many there were."""
        count: Counter[str] = Counter()
        for row in _with_prints(dataset, reading):
            said, copies = self.words.of(row.text), _likest(self.pictures, row.prints)
            count["rows"] += 1
            count["pictures"] += len(row.prints)
            count["unreadable"] += row.unreadable
            count["same_picture"] += bool(copies)
            count["same_words"] += bool(said)
            place = {"dataset": dataset, "row": row.where, "sample_id": row.id}
            for at, copy in copies.items():
                self._enter(place, row.pictures[at], copy, said)
            if not copies:
                self.texts += [place | {"question_id": key, "words": words} for key, words in said.items()]
        return {"path": dataset, **{key: count[key] for key in COUNTS}}

    def _enter(
        self, place: dict[str, str], picture: bytes | str, copy: tuple[int, int, float], said: dict[str, str]
    ) -> None:
        number, distance, correlation = copy
        name = self.ids[number]
        found = {"image_id": name, "distance": distance, "correlation": round(correlation, 4)}
        questions = self.asked[name]
        self.rows.append(place | found | {"questions": questions, "words": any(key in said for key in questions)})
        if len(self.shown) < SHOWN:
            self.shown.append((_bytes(picture), _bytes(str(self.paths[name]))))


def _benchmark_prints(of: dict[str, Path]) -> tuple[list[str], list[Fingerprint]]:
    """Ids and fingerprints of the pictures that can be read."""
    ids, prints, bad = list[str](), list[Fingerprint](), list[str]()
    with Progress(len(of), "overlap: benchmark", "pictures") as progress, _threads() as threads:
        for name, made in zip(of, threads.map(_print, of.values()), strict=True):
            progress.update(1)
            if isinstance(made, BadImage):
                bad.append(str(made))
            else:
                ids.append(name)
                prints.append(made)
    if bad:
        say(f"overlap: {len(bad)} picture(s) of the benchmark cannot be read, e.g. {bad[0]}")
    if not ids:
        raise UserError(f"evaluate.images: none of the benchmark's {len(of)} pictures can be read")
    return ids, prints


def _with_prints(dataset: str, reading: Reading) -> Iterator[_Row]:
    rows = _rows(dataset, reading)
    with Progress(None, f"overlap: {Path(dataset).name}", "rows") as progress, _threads() as threads:
        while chunk := list(islice(rows, _CHUNK)):
            yield from threads.map(_look, chunk)
            progress.update(len(chunk))


def _look(row: _Row) -> _Row:
    """Fingerprints of its pictures, and the id of its record."""
    kept = []
    for picture in row.pictures:
        try:
            data = _bytes(picture)
            row.prints.append(fingerprint(data))
        except BadImage:
            row.unreadable += 1
            continue
        kept.append(picture)
        if len(row.pictures) == 1 and not row.id:
            row.id = sample_id(data, None, row.caption)
    row.pictures = kept
    return row


def _print(path: Path) -> Fingerprint | BadImage:
    try:
        return fingerprint(read_bytes(path))
    except BadImage as reason:
        return reason


def _bytes(picture: bytes | str) -> bytes:
    return picture if isinstance(picture, bytes) else read_bytes(picture)


def _threads() -> ThreadPoolExecutor:
    """Pillow leaves the interpreter alone while it decodes."""
    return ThreadPoolExecutor(os.cpu_count() or 1)


def _rows(dataset: str, reading: Reading) -> Iterator[_Row]:
    directory = Path(dataset)
    if directory.is_dir() and holds_records(directory):
        yield from _records(dataset)
        return
    for row in open_dataset(dataset, reading).rows():
        text = " ".join([row.caption, *_strings(row.meta)])
        yield _Row(dataset, row.where, text, list(row.pictures) if row.error is None else [], row.caption)


def _records(dataset: str) -> Iterator[_Row]:
    import pyarrow.parquet as pq

    for shard in shard_paths(dataset):
        columns = ["sample_id", "image", "image_uri", "caption", "recaption", "meta"]
        for batch in pq.ParquetFile(shard).iter_batches(_CHUNK, columns=columns):
            for row in batch.to_pylist():
                image = row["image"] if row["image"] is not None else row["image_uri"]
                texts = [row["caption"] or "", row["recaption"] or "", *_strings(json.loads(row["meta"] or "{}"))]
                yield _Row(dataset, row["sample_id"], " ".join(texts), [image] if image else [], id=row["sample_id"])


def _strings(value: Any) -> Iterable[str]:
    """All texts within a value of JSON."""
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        yield from _strings(inner)


def _likest(pictures: Pictures, prints: Sequence[Fingerprint]) -> dict[int, tuple[int, int, float]]:
    """Number of a row's picture -> the benchmark's that is likest, where one is a copy."""
    return {at: found[0] for at, found in enumerate(pictures.copies(prints)) if found}


class _Words:
    """Questions by the words in a row that they hold."""

    def __init__(self, questions: Sequence[Question], words: int) -> None:
        self.known: dict[int, dict[str, str]] = {}  # how many words -> the words -> id of the first question with them
        for question in questions:
            said = words_of(question.text.lower())
            size = min(len(said), words)
            if size >= min(_WHOLE, words):
                for text in _grams(said, size):
                    self.known.setdefault(size, {}).setdefault(text, question.id)

    def of(self, text: str) -> dict[str, str]:
        """Question id -> the words that the text shares with it."""
        said = words_of(text.lower()) if self.known else []
        found: dict[str, str] = {}
        for size, known in self.known.items():
            for words in _grams(said, size):
                if words in known:
                    found.setdefault(known[words], words)
        return found


def _grams(words: Sequence[str], size: int) -> Iterator[str]:
    return (" ".join(words[start : start + size]) for start in range(len(words) - size + 1))
