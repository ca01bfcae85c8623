"""Quality metrics against values computed by hand and against Data-Juicer's own operators."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.errors import UserError
from pipelines.manifest import open_stage
from pipelines.records import new_record, write_shard
from pipelines.refine import metrics


def test_words_are_lower_case_without_outer_punctuation_and_numbers_count() -> None:
    assert metrics.words_of('A "Cafe" sign, $5 -- don\'t!') == ["a", "cafe", "sign", "5", "don't"]


def test_metrics_equal_hand_computed_values() -> None:
    """Three texts, eight words, of which red, sign, a, blue are the distinct ones; two of three texts are distinct."""
    found = metrics.text_metrics(["a red sign", "a red sign", "Red blue"])
    assert (found["rows"], found["words"], found["unique_words"]) == (3, 8, 4)
    assert found["lexical_diversity"] == 0.5
    assert found["mean_words"] == pytest.approx(8 / 3, abs=1e-6)
    assert found["unique_texts"] == pytest.approx(2 / 3, abs=1e-6)
    assert found["mattr"] is None  # fewer words than a window: no number rather than one that cannot be compared
    assert found["char_rep_ratio"] == found["word_rep_ratio"] == 0.0


def test_word_repetition_follows_data_juicers_definition() -> None:
    """`sale now sale now sale`: bigrams sale-now x2, now-sale x2, so 4 of 4 stand in a repeated bigram; the other text
    has none.
    """
    found = metrics.text_metrics(["sale now sale now sale", "one two three"])
    assert found["word_rep_ratio"] == 0.5


def test_character_repetition_follows_data_juicers_definition() -> None:
    """`abababababab` (12 characters): 3 ten-grams, 2 distinct with counts 2 and 1; the top int(sqrt(2)) = 1 holds 2 of
    3.
    """
    assert metrics.repetition(["abababababab"])[0] == [pytest.approx(2 / 3)]


def test_mattr_equals_the_definition_window_by_window() -> None:
    stream = [1, 2, 1, 3, 3, 3, 4, 1, 2, 2]
    windows = [stream[i : i + 4] for i in range(len(stream) - 3)]
    expected = sum(len(set(window)) / 4 for window in windows) / len(windows)
    assert metrics.mattr(stream, 4) == pytest.approx(expected, abs=1e-6)


def test_mattr_does_not_fall_when_the_corpus_grows() -> None:
    """What unique words / words gets wrong: the same captions, ten times as many of them."""
    texts = [f"word{i} word{i + 1} word{i + 2}" for i in range(300)]
    once, ten = metrics.text_metrics(texts), metrics.text_metrics(texts * 10)
    assert ten["lexical_diversity"] < once["lexical_diversity"] / 9
    assert ten["mattr"] == pytest.approx(once["mattr"], rel=0.01)


def test_no_texts_give_zeros_and_no_division_by_zero() -> None:
    found = metrics.text_metrics([])
    assert found["rows"] == found["words"] == found["lexical_diversity"] == found["mean_words"] == 0


def test_stats_of_records_shows_every_text_column(tmp_path: Path) -> None:
    record = new_record("image", image=b"x") | {"recaption": "a red sign that says cafe"}
    write_shard(tmp_path / "shard-0.parquet", [record])  # type: ignore[list-item]
    found = metrics.stats(tmp_path)
    assert found["text"] == "recaption" and found["words"] == 6
    assert found["columns"]["caption"]["words"] == 1


def test_stats_of_a_stage_that_has_not_finished_is_refused(tmp_path: Path) -> None:
    """Half of the captions would pass for all of them."""
    stage = open_stage(tmp_path / "captions", "caption", {})
    write_shard(tmp_path / "captions" / "shard-0.parquet", [new_record("image", image=b"x")])
    with pytest.raises(UserError, match="captune caption has not finished"):
        metrics.stats(tmp_path / "captions")
    stage.finish()
    assert metrics.stats(tmp_path / "captions")["text"] == "recaption"


def test_stats_reads_any_dataset_and_counts_no_format_tokens(tmp_path: Path) -> None:
    line = {"text": "<__dj__image>\na red sign <|__dj__eoc|>", "images": ["a.jpg"]}
    (tmp_path / "dataset.jsonl").write_text(json.dumps(line) + "\nno json\n")
    found = metrics.stats(tmp_path / "dataset.jsonl")
    assert (found["rows"], found["words"], found["text"]) == (2, 3, "caption")


def test_stats_of_nothing_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        metrics.stats(tmp_path / "nowhere")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="broken.parquet"):
        metrics.stats(tmp_path)
