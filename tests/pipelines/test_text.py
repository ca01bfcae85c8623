"""Words, repetition and diversity: by hand, in several scripts, and against Data-Juicer's own operators."""

from __future__ import annotations

import random

import pytest

from pipelines.refine.operators import load_data_juicer
from pipelines.text import Texts, char_repetition, has_unspaced, mattr, text_metrics, word_repetition, words_of

ENGLISH = [
    "a red sign that says cafe beside two blue stars",
    "“The price,” it says, ‘is $5.99’ – and 50% off… (today only!)",
    "sale now sale now sale",
    "5 stars, 6 stars, 7 stars; 8 stars",
    "the 1st sign and the 2nd sign and the 3rd sign",
    "a sign a sign a sign a sign",
    "word",
    "",
    "  \t\n ",
    "!!! --- ???",
    "🐱 a cat 🐱 a cat ☎",
    "photo-realistic e-mail: don't, o'clock, 3-d, 50/50, www.example.org/x",
]
LATIN = [
    *ENGLISH,
    "« Un panneau rouge », dit l’été à la forêt. Un panneau rouge !",
    "¿Qué dice el letrero? ¡Dice «café»! ¿Qué dice el letrero?",
    "Ein grünes Straßenschild – „Müllerstraße“ – ein grünes Straßenschild",
    "Czerwony znak i żółty pies, czerwony znak i żółty pies",
    "Một biển báo màu đỏ và một biển báo màu xanh",
]


def data_juicers(name: str, key: str, texts: list[str], **parameters: int) -> list[float]:
    """What Data-Juicer's own operator finds."""
    operator = load_data_juicer()[name](**parameters)
    samples = {"text": list(texts), "__dj__stats__": [{} for _ in texts]}
    return [float(stats[key]) for stats in operator.compute_stats_batched(samples)["__dj__stats__"]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('A "Cafe" sign, $5 -- don\'t!', ["a", "cafe", "sign", "5", "don't"]),
        ("«L’été»… “Straße” —", ["l’été", "straße"]),
        ("cat🐱 👍🏽 ☎️ 5️⃣", ["cat", "5"]),
        ("caf\u00e9 cafe\u0301", ["café", "café"]),
        ("一个红色的停车标志，旁边有T恤3件。", list("一个红色的停车标志旁边有") + ["t", "恤", "3", "件"]),
        ("コーヒーを飲む人々。", ["コー", "ヒー", "を", "飲", "む", "人", "々"]),
        ("ป้ายหยุดสีแดง", ["ป้", "า", "ย", "ห", "ยุ", "ด", "สี", "แ", "ด", "ง"]),
        ("빨간 표지판, 두 개", ["빨간", "표지판", "두", "개"]),
        ("लाल चिन्ह।", ["लाल", "चिन्ह"]),
        ("لافتة حمراء، «قف»؟", ["لافتة", "حمراء", "قف"]),
    ],
)
def test_words_of_many_scripts(text: str, words: list[str]) -> None:
    assert words_of(text) == words


def test_who_needs_more_than_white_space() -> None:
    assert all(has_unspaced(text) for text in ("a 红 sign", "ป้าย", "カフェ", "ပန်း", "ផ្កា", "ດອກ"))
    assert not any(has_unspaced(text) for text in ("a sign", "une forêt", "빨간 표지판", "लाल", "。，"))


def test_repetition_is_data_juicers_for_latin_scripts() -> None:
    """The same numbers as in a record's `stats`, whichever of the two counted them."""
    chance = random.Random(3)
    pool = [word for text in LATIN for word in text.split()]
    texts = LATIN + [" ".join(chance.choices(pool, k=chance.randint(0, 30))) for _ in range(500)]
    expected = data_juicers("word_repetition_filter", "word_rep_ratio", texts, rep_len=2)
    assert [word_repetition(words_of(text)) for text in texts] == pytest.approx(expected)
    assert sum(ratio > 0 for ratio in expected) > 50


def test_character_repetition_is_data_juicers_for_every_script() -> None:
    """By hand: `abababababab` has 3 ten-grams of 2 kinds; the top int(sqrt(2)) = 1 kind holds 2 of the 3."""
    assert char_repetition("abababababab") == pytest.approx(2 / 3)
    texts = [*LATIN, "红色标志" * 6, "一个红色的停车标志", "ป้ายหยุด" * 5, "ab" * 40, "abcabcabcabcabc 123"]
    expected = data_juicers("character_repetition_filter", "char_rep_ratio", texts, rep_len=10)
    assert [char_repetition(text) for text in texts] == pytest.approx(expected)


def test_a_loop_shows_in_scripts_without_spaces() -> None:
    """Half of these say one phrase six times; a caption of nine characters is no caption of one word."""
    found = text_metrics(["一个红色的停车标志", "红色标志" * 6] * 4)
    assert (found["mean_words"], found["word_rep_ratio"]) == (16.5, 0.5)
    assert (found["words"], found["unique_words"]) == (132, 9)


def test_metrics_equal_hand_computed_values() -> None:
    """Three texts, eight words, of which red, sign, a, blue are the distinct ones; two of three texts are distinct."""
    found = text_metrics(["a red sign", "a red sign", "Red blue"])
    assert (found["rows"], found["texts"], found["words"], found["unique_words"]) == (3, 3, 8, 4)
    assert found["lexical_diversity"] == 0.5
    assert found["mean_words"] == pytest.approx(8 / 3, abs=1e-6)
    assert found["unique_texts"] == pytest.approx(2 / 3, abs=1e-6)
    assert found["mattr"] is None  # fewer words than a window: no number rather than one that cannot be compared
    assert found["char_rep_ratio"] == found["word_rep_ratio"] == 0.0


def test_a_failed_row_is_a_row_and_no_text() -> None:
    """An empty caption lowers the mean, a row without a picture does not; piece by piece the same comes out."""
    found = text_metrics(["a red sign", "", None])
    assert (found["rows"], found["texts"], found["mean_words"]) == (3, 2, 1.5)
    pieces = Texts()
    pieces.add(["a red sign"])
    pieces.add(["", None])
    assert pieces.metrics() == {key: found[key] for key in pieces.metrics()}
    empty = text_metrics([])
    assert empty["rows"] == empty["words"] == empty["lexical_diversity"] == empty["mean_words"] == 0


def test_mattr_equals_the_definition_window_by_window() -> None:
    stream = [1, 2, 1, 3, 3, 3, 4, 1, 2, 2]
    windows = [stream[i : i + 4] for i in range(len(stream) - 3)]
    expected = sum(len(set(window)) / 4 for window in windows) / len(windows)
    assert mattr(stream, 4) == pytest.approx(expected, abs=1e-6)


def test_mattr_does_not_fall_when_the_corpus_grows() -> None:
    """What unique words / words gets wrong: the same captions, ten times as many of them."""
    texts = [f"word{i} word{i + 1} word{i + 2}" for i in range(300)]
    once, ten = text_metrics(texts), text_metrics(texts * 10)
    assert ten["lexical_diversity"] < once["lexical_diversity"] / 9
    assert ten["mattr"] == pytest.approx(once["mattr"], rel=0.01)
