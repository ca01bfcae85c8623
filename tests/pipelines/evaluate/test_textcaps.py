"""TextCaps: captions scored by CIDEr-D, equal to what `pycocoevalcap` recorded, its tokenizer's oddities included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines.evaluate.cider import cider, tokens
from ray_jobs import cli

RECORDED = json.loads(Path(__file__).with_name("reference_cider.json").read_text())


def test_tokens_are_those_of_the_reference() -> None:
    for text, expected in RECORDED["tokens"]:
        assert " ".join(tokens(text)) == expected, text


def test_scores_are_those_of_the_reference() -> None:
    """Ninety pictures: captions of a reference, cut, of another picture, empty."""
    said, told, expected = zip(*RECORDED["captions"], strict=True)
    found = cider(said, told)
    assert found == pytest.approx(list(expected), abs=1e-9)
    assert sum(found) / len(found) == pytest.approx(RECORDED["mean"], abs=1e-9)


def test_textcaps_is_asked_and_scored(tmp_path: Path, endpoint: Any, capsys: Any) -> None:
    """A question a picture, whose entries stand once for each of its captions; with OCR tokens; and the test split."""
    texts = {"a": ["a red stop sign", "a sign that says stop"], "b": ["a blue bus", "a bus on a street"]}
    entries = [
        {"image_id": key, "reference_strs": both, "caption_str": one} for key, both in texts.items() for one in both
    ]
    (tmp_path / "pictures").mkdir()
    for key in texts:
        Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / f"{key}.jpg")
    ocr = {"data": [{"image_id": "a", "ocr_tokens": ["STOP"]}, {"image_id": "b", "ocr_tokens": []}]}
    (tmp_path / "ocr.json").write_text(json.dumps(ocr))

    def evaluate(name: str, rows: list[dict[str, Any]], *more: str) -> dict[str, Any]:
        (tmp_path / f"{name}.json").write_text(json.dumps({"data": rows}))
        argv = ["evaluate", "--benchmark", "textcaps", "--annotations", str(tmp_path / f"{name}.json")]
        argv += ["--images", str(tmp_path / "pictures"), "--endpoint", endpoint.url]
        assert cli.main([*argv, "--output", str(tmp_path / name), *more]) == 0
        return dict(json.loads((tmp_path / name / "scores.json").read_text()))

    endpoint.says = "A red stop sign."
    scores = evaluate("val", entries, "--evaluate.ocr_tokens", "true", "--evaluate.ocr", str(tmp_path / "ocr.json"))
    expected = cider([endpoint.says] * 2, list(texts.values()))
    assert [row["score"] for row in scores["questions"]] == pytest.approx([value / 10 for value in expected])
    assert scores["figures"]["CIDEr"] == pytest.approx(sum(expected) / 2) and scores["count"] == 2
    asked = {body["messages"][0]["content"][1]["text"] for body in endpoint.bodies}
    prompt = "Provide a one-sentence caption for the provided image.\nReference OCR token: "
    assert asked == {prompt + "STOP", prompt}
    capsys.readouterr()
    argv = ["score", "--benchmark", "textcaps", "--annotations", str(tmp_path / "val.json")]
    assert cli.main([*argv, "--predictions", str(tmp_path / "val" / "textcaps_results.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(scores["accuracy"])

    assert evaluate("test", [{"image_id": "a"}])["accuracy"] is None
    submitted = json.loads((tmp_path / "test" / "textcaps_results.json").read_text())
    assert submitted == [{"image_id": "a", "caption": "A red stop sign."}]
