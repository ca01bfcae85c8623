"""The page of a run with five arms, an explanation and further benchmarks: what the verdict is made of."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pipelines.manifest import write_json
from pipelines.records import read_shards
from pipelines.report import page
from pipelines.text import text_metrics

from .synthetic_run import FIVE, build, explain


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Original, filtered, recaptioned, both, and a control, whose gain was explained."""
    run = build(tmp_path_factory.mktemp("five"), arms=FIVE)
    explain(run)
    return run


@pytest.fixture(scope="module")
def text(five: Path) -> str:
    """What the page says, without markup, white space as one."""
    return plain(page.run(five))


def plain(path: Path) -> str:
    html = path.read_text(encoding="utf-8").partition("</style>")[2]
    return " ".join(re.sub(r"<[^>]*>", " ", html).replace("\N{NARROW NO-BREAK SPACE}", " ").split())


def test_the_largest_gain_leads_and_the_control_is_told_apart(five: Path, text: str) -> None:
    lead = text.index("Trained on the enhanced data the model scores")
    second = re.search(r"recaptioned (Yes|Not shown)\. ", text)
    assert second is not None and lead < second.start() < text.index("none The control.")
    assert "It trains on no captions: as good as original, those captions taught nothing" in text
    assert "Trained on the none data" not in text
    html = (five / "report" / "index.html").read_text(encoding="utf-8")
    assert html.count("<h1") == 1 and 'class="arm a4"' in html  # a colour for each of five


def test_causes_are_drawn_and_told_with_their_numbers(five: Path, text: str) -> None:
    found = json.loads((five / "explain" / "enhanced" / "explanation.json").read_text())
    parts = {cause["name"]: cause for cause in found["causes"]}
    for name, shown in (("captions", "new captions"), ("word_repetition_filter", "word_repetition_filter")):
        assert f"{shown} {100 * parts[name]['part']:+.1f}".replace("-", "\N{MINUS SIGN}") in text
    assert "Without effect, because no row changed: idle." in text
    assert "with one training seed its luck is in none of them" in text
    html = (five / "report" / "index.html").read_text(encoding="utf-8")
    drawing = re.search(r'<svg[^>]*aria-label="From the score of original to that of enhanced.*?</svg>', html, re.S)
    assert drawing is not None and drawing[0].count("<rect") == 4  # both arms and two causes that changed rows


def test_in_short_has_the_numbers_of_the_files(five: Path, text: str) -> None:
    metrics = json.loads((five / "enhanced" / "dataset" / "metrics.json").read_text())
    before, after = (metrics[key]["lexical_diversity"] for key in ("before", "after"))
    assert f"{after:.3g} {100 * (after / before - 1):+.0f} %".replace("-", "\N{MINUS SIGN}") in text
    table = read_shards(five / "enhanced" / "dataset", columns=["sample_id", "caption", "recaption"])
    same = [text_metrics(table[name].to_pylist())["lexical_diversity"] for name in ("caption", "recaption")]
    assert f"{same[0]:.3g} → {same[1]:.3g}" in text
    for words in ("Kept share", "Gradient norm, first → last align", "Trainable share instruct", "Score"):
        assert words in text


def test_drawn_questions_are_called_so_and_further_benchmarks_have_their_own_rows(tmp_path: Path) -> None:
    run = build(tmp_path)
    comparison = json.loads((run / "comparison.json").read_text())
    kinds = {"yes/no": {"count": 40, "baseline": 0.25, "arm": 0.5, "won": 12, "lost": 2}}
    kinds["number"] = {"count": 20, "baseline": 0.5, "arm": 0.5, "won": 3, "lost": 3}
    other = json.loads(json.dumps(comparison)) | {"benchmark": "vqav2"}
    other["differences"]["enhanced"]["kinds"] = kinds
    write_json(run / "comparison.json", comparison | {"drawn": True, "also": {"vqav2": other}})
    said = plain(page.run(run))
    assert "on 60 drawn questions in TextVQA's layout" in said.replace("&#39;", "'")
    assert "it covers other questions on other pictures, not another training seed" in said
    assert "On other benchmarks" in said and "VQAv2 60 enhanced" in said
    assert "By kind of question VQAv2" in said and "yes/no 40 enhanced 50.0 % 25.0 % +25.0 12 2" in said
