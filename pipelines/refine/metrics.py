"""Quality metrics of captions: how varied they are, how long, and how much they repeat themselves.

A word is a whitespace-separated token in lower case without punctuation at its ends; numbers are words (a price is what
a caption says). Data-Juicer's own word count drops numbers, so `mean_words` can exceed the mean of its `num_words`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipelines.manifest import MANIFEST, read_json, require_finished, training_text
from pipelines.records import holds_records, read_shards
from pipelines.text import mattr, words_of

MATTR_WINDOW = 500
"""Words per window. Some fifty captions: wide enough to see that captions repeat one another, small enough for a small
dataset."""
CHAR_NGRAM = 10
"""Data-Juicer's default."""
WORD_NGRAM = 2
"""Data-Juicer's default of 10 cannot repeat inside a caption of ten words."""
_BATCH = 10_000


def text_metrics(texts: Sequence[str]) -> dict[str, Any]:
    """Metrics of a list of texts; ratios are 0 when there is nothing to divide by.

    Returns:
        rows, words, unique_words;
        lexical_diversity: unique words / words. It falls as a corpus grows (Heaps' law), so compare it only at like
            sizes;
        mattr: the same at an equal number of words: the mean of unique words / words over every window of
            `mattr_window` consecutive words (moving-average type-token ratio, Covington and McFall 2010). None when
            there are fewer words;
        mean_words: words / rows;
        unique_texts: share of distinct texts among the rows;
        char_rep_ratio, word_rep_ratio: mean over the texts of Data-Juicer's stats of these names, at `char_rep_len`
            characters and `word_rep_len` words.
    """
    counts: Counter[str] = Counter()
    stream: list[int] = []
    numbers: dict[str, int] = {}
    for text in texts:
        found = words_of(text)
        counts.update(found)
        stream += [numbers.setdefault(word, len(numbers)) for word in found]
    rows, words = len(texts), len(stream)
    char_rep, word_rep = repetition(texts)
    return {
        "rows": rows,
        "words": words,
        "unique_words": len(counts),
        "lexical_diversity": _ratio(len(counts), words),
        "mattr": mattr(stream, MATTR_WINDOW),
        "mattr_window": MATTR_WINDOW,
        "mean_words": _ratio(words, rows),
        "unique_texts": _ratio(len(set(texts)), rows),
        "char_rep_ratio": _ratio(sum(char_rep), rows),
        "char_rep_len": CHAR_NGRAM,
        "word_rep_ratio": _ratio(sum(word_rep), rows),
        "word_rep_len": WORD_NGRAM,
    }


def repetition(texts: Sequence[str]) -> tuple[list[float], list[float]]:
    """Character and word repetition ratio of each text, computed by Data-Juicer's own operators."""
    from pipelines.refine.operators import load_data_juicer

    modules = load_data_juicer()
    by_character = modules["character_repetition_filter"](rep_len=CHAR_NGRAM)
    by_word = modules["word_repetition_filter"](rep_len=WORD_NGRAM)
    stats: list[dict[str, float]] = []
    for start in range(0, len(texts), _BATCH):
        batch = list(texts[start : start + _BATCH])
        samples = {"text": batch, "__dj__stats__": [{} for _ in batch]}
        samples = by_word.compute_stats_batched(by_character.compute_stats_batched(samples))
        stats += samples["__dj__stats__"]
    return [float(s["char_rep_ratio"]) for s in stats], [float(s["word_rep_ratio"]) for s in stats]


def stats(input: Path | str) -> dict[str, Any]:
    """Metrics of a dataset: those of its training text at the top, those of every text column under `columns`.

    The training text of records is what `manifest.training_text` says, of any other dataset the caption as found.

    Raises:
        UserError: nothing readable at `input`, or a stage that has not finished.
    """
    directory = Path(input)
    require_finished(directory)
    is_records = directory.is_dir() and holds_records(directory)
    text = training_text(directory) if is_records else "caption"
    columns = dict(_record_texts(directory, text)) if is_records else {"caption": _dataset_texts(input)}
    metrics = {name: text_metrics(texts) for name, texts in columns.items()}
    result: dict[str, Any] = {}
    if is_records and (directory / MANIFEST).exists():
        manifest = read_json(directory / MANIFEST)
        result = {key: manifest[key] for key in ("rows_in", "kept", "rejected", "retention") if key in manifest}
    return {"input": str(input), "text": text, **metrics[text], **result, "columns": metrics}


def _record_texts(directory: Path, training: str) -> Iterator[tuple[str, list[str]]]:
    """Caption, training text, and any other text column that holds something; a row without a text counts as one
    without words.
    """
    table = read_shards(directory, columns=["sample_id", "caption", "recaption"])
    for name in ("caption", "recaption"):
        if name in ("caption", training) or table[name].null_count < table.num_rows:
            yield name, [text or "" for text in table[name].to_pylist()]


def _dataset_texts(input: Path | str) -> list[str]:
    from pipelines.formats import open_dataset

    return [row.caption or "" for row in open_dataset(input).rows()]


def _ratio(part: float, whole: float) -> float:
    return round(part / whole, 6) if whole else 0.0
