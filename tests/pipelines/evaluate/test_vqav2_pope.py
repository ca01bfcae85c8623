"""VQAv2 and POPE: asked and scored through the commands, equal to the authors' own code on recorded answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines.evaluate.metrics import vqa_score
from ray_jobs import cli

RECORDED = json.loads((Path(__file__).parent / "reference_vqav2_pope.json").read_text())
VQA, ANSWERS = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"


def test_vqas_official_scores_are_met_on_its_oddities() -> None:
    """400 answers with marks, thousands, articles, contractions and unanimous humans, to the last digit recorded."""
    for said, answers, per_cent in RECORDED["vqa"]:
        assert 100 * vqa_score(said, answers) == pytest.approx(per_cent, abs=1e-8), (said, answers)


def pictures(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / name)
    return folder


def evaluate(benchmark: str, annotations: Path, images: Path, endpoint: Any, output: Path) -> dict[str, Any]:
    argv = ["evaluate", "--benchmark", benchmark, "--annotations", annotations, "--images", images]
    assert cli.main([str(word) for word in [*argv, "--endpoint", endpoint.url, "--output", output]]) == 0
    return dict(json.loads((output / "scores.json").read_text()))


def test_pope_is_asked_and_has_its_authors_figures(tmp_path: Path, endpoint: Any, capsys: Any) -> None:
    """Two kinds from a folder; then 300 recorded answers, whose figures are those of the authors' `evaluate.py`."""
    images = pictures(tmp_path / "pictures", "a.jpg")
    folder = tmp_path / "pope"
    folder.mkdir()
    for kind, label in (("random", "yes"), ("popular", "no")):
        row = {"question_id": 1, "image": "a.jpg", "text": f"Is there a {kind} dog?", "label": label}
        (folder / f"coco_pope_{kind}.json").write_text(json.dumps(row) + "\n")
    endpoint.says = "Yes, there is."
    scores = evaluate("pope", folder, images, endpoint, tmp_path / "out")
    assert scores["accuracy"] == 0.5 and scores["figures"]["recall"] == 1.0 and scores["figures"]["F1 of popular"] == 0
    assert scores["kinds"]["random"] == {"accuracy": 1.0, "count": 1}
    answer = (tmp_path / "out" / "answers_popular.json").read_text()
    assert json.loads(answer) == {"question": "Is there a popular dog?", "answer": "Yes, there is."}

    rows = RECORDED["pope"]["rows"]
    questions = [{"question_id": n, "image": "a.jpg", "text": "?", "label": label} for n, (_, label) in enumerate(rows)]
    said = [{"question_id": n, "text": text} for n, (text, _) in enumerate(rows)]
    for name, lines in (("coco_pope_all.json", questions), ("said.jsonl", said)):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    capsys.readouterr()
    argv = ["score", "--benchmark", "pope", "--annotations", tmp_path / "coco_pope_all.json", "--json"]
    assert cli.main([*map(str, argv), "--predictions", str(tmp_path / "said.jsonl")]) == 0
    found = json.loads(capsys.readouterr().out)
    theirs = RECORDED["pope"]["figures"]
    assert found["accuracy"] == pytest.approx(theirs["Accuracy"], abs=1e-12)
    theirs_in_order = [{"question": "?", "answer": text} for text, _ in rows]
    (tmp_path / "theirs.json").write_text("".join(json.dumps(line) + "\n" for line in theirs_in_order))
    assert cli.main([*map(str, argv), "--predictions", str(tmp_path / "theirs.json")]) == 0
    assert json.loads(capsys.readouterr().out)["figures"] == found["figures"]
    names = {"precision": "Precision", "recall": "Recall", "F1": "F1 score", "yes": "Yes ratio"}
    assert found["figures"] == pytest.approx({ours: theirs[name] for ours, name in names.items()}, abs=1e-12)


def vqa_files(folder: Path, answered: bool = True) -> Path:
    folder.mkdir()
    kinds = ("yes/no", "number", "other")
    questions = [{"question_id": n, "image_id": 42, "question": f"What {n}?"} for n in range(3)]
    (folder / VQA).write_text(json.dumps({"data_subtype": "val2014", "questions": questions}))
    if answered:
        rows = [
            {
                "question_id": n,
                "answer_type": kind,
                "answers": [{"answer": a, "answer_id": i} for i, a in enumerate(said)],
            }
            for n, (kind, said) in enumerate(
                zip(kinds, (["yes"] * 10, ["2"] * 10, ["cat"] * 5 + ["dog"] * 5), strict=True)
            )
        ]
        (folder / ANSWERS).write_text(json.dumps({"annotations": rows}))
    return folder / VQA


def test_vqav2_is_asked_with_its_files_as_published(tmp_path: Path, endpoint: Any, capsys: Any) -> None:
    """Scores by kind of answer, the official results file, and refusals that name file and question."""
    images = pictures(tmp_path / "pictures", "COCO_val2014_000000000042.jpg")
    annotations = vqa_files(tmp_path / "vqa")
    endpoint.says = "the Cat"
    scores = evaluate("vqav2", annotations, images, endpoint, tmp_path / "out")
    assert {kind: found["accuracy"] for kind, found in scores["kinds"].items()} == {
        "number": 0,
        "other": 1,
        "yes/no": 0,
    }
    results = tmp_path / "out" / "vqav2_results.json"
    assert json.loads(results.read_text())[2] == {"question_id": 2, "answer": "the Cat"}
    argv = ["score", "--benchmark", "vqav2", "--annotations", str(annotations), "--predictions", str(results)]
    assert cli.main(argv) == 0 and "VQAv2: 33.33 % of 3 questions" in capsys.readouterr().out

    assert cli.main([*argv[:3], "--annotations", str(annotations.with_name(ANSWERS)), *argv[5:]]) == 2
    assert "holds answers; name the file of questions beside it" in capsys.readouterr().err
    bare = vqa_files(tmp_path / "bare", answered=False)
    argv = ["evaluate", "--benchmark", "vqav2", "--images", str(images), "--endpoint", endpoint.url, "--output", "no"]
    assert cli.main([*argv, "--annotations", str(bare)]) == 2
    assert f"{ANSWERS}: the answers to the questions of val2014 belong there" in capsys.readouterr().err
    bare.write_text(json.dumps({"data_subtype": "test2015", "questions": [{"question_id": 7, "question": "?"}]}))
    assert cli.main([*argv, "--annotations", str(bare)]) == 2
    assert "questions[0]: needs 'question_id', 'image_id' and 'question'" in capsys.readouterr().err


def test_vqav2_test_dev_has_a_submission_and_no_score(tmp_path: Path, endpoint: Any, capsys: Any) -> None:
    """Pictures of test2015, answers normalized as LLaVA's script does, the other questions of test2015 with nothing."""
    images = pictures(tmp_path / "pictures", "COCO_test2015_000000000042.jpg")
    name = "v2_OpenEnded_mscoco_test-dev2015_questions.json"
    asked = [{"question_id": 7, "image_id": 42, "question": "What?"}]
    (tmp_path / name).write_text(json.dumps({"data_subtype": "test-dev2015", "questions": asked}))
    whole = {"data_subtype": "test2015", "questions": [{"question_id": 6}, *asked]}
    (tmp_path / name.replace("-dev", "")).write_text(json.dumps(whole))
    endpoint.says = "The Cats, two of them."
    scores = evaluate("vqav2", tmp_path / name, images, endpoint, tmp_path / "out")
    assert scores["accuracy"] is None and scores["count"] == 1 and "answers of this split are" in scores["withheld"]
    assert "VQAv2: 1 questions asked; no score" in capsys.readouterr().out
    submission = json.loads((tmp_path / "out" / "vqav2_submission.json").read_text())
    assert submission == [{"question_id": 6, "answer": ""}, {"question_id": 7, "answer": "cats 2 of them"}]
    results = str(tmp_path / "out" / "vqav2_results.json")
    argv = ["score", "--benchmark", "vqav2", "--annotations", str(tmp_path / name), "--predictions", results]
    assert cli.main(argv) == 2 and "no score: the answers of this split are withheld" in capsys.readouterr().err
    argv = ["compare", f"a={tmp_path / 'out'}", f"b={tmp_path / 'out'}", "--output", str(tmp_path / "compared")]
    assert cli.main(argv) == 2 and "holds no scores" in capsys.readouterr().err


def test_pope_refuses_what_is_not_its_layout(tmp_path: Path, capsys: Any) -> None:
    argv = ["score", "--benchmark", "pope", "--predictions", "x", "--annotations"]
    for text, words in (
        ("", "holds no questions"),
        ('{"question_id": 1, "image": "a.jpg", "text": "?"}', "line 1: lacks 'label'"),
        ('{"question_id": 1, "image": "a.jpg", "text": "?", "label": "maybe"}', "label is 'maybe', not yes or no"),
        ("[not json", "line 1 is not valid JSON"),
    ):
        (tmp_path / "pope.json").write_text(text)
        assert cli.main([*argv, str(tmp_path / "pope.json")]) == 2
        assert words in capsys.readouterr().err
