"""Recipes: what is wrong with one is said before any row is touched, in words a stranger understands."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageFile

from pipelines.errors import UserError, WorkFailed
from pipelines.refine import operators as dj
from pipelines.refine.apply import Row, run_operators

SAMPLE = Path(__file__).parents[3] / "pipelines" / "recipes" / "refine_captions.yaml"


def jpeg(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((width, height), 60).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("process: [", "not valid YAML"),
        ("proces:\n  - text_length_filter: {}\n", "`process:` list"),
        ("- text_length_filter: {}\n", "`process:` list"),
        ("process: []\n", "`process:` list"),
        ("process:\n  - {text_length_filter: {}, words_num_filter: {}}\n", "process entry 1"),
        ("process:\n  - text_length_filter: {}\n  - words_num_filter: [3]\n", "process entry 2"),
    ],
)
def test_a_file_that_is_no_recipe_is_named_with_its_fault(tmp_path: Path, text: str, says: str) -> None:
    path = recipe(tmp_path, text)
    with pytest.raises(UserError) as caught:
        dj.read_recipe(path)
    assert says in str(caught.value) and str(path) in str(caught.value)


def test_a_recipe_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere.yaml: no such file"):
        dj.read_recipe(tmp_path / "nowhere.yaml")


def test_keys_for_data_juicers_own_executor_are_ignored_aloud(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path, "np: 4\nexport_path: x\nprocess:\n  - text_length_filter:\n  - words_num_filter\n")
    assert dj.read_recipe(path) == [{"text_length_filter": {}}, {"words_num_filter": {}}]
    assert "ignoring export_path, np" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"text_lenght_filter": {}}, ["text_lenght_filter", "did you mean text_length_filter"]),
        ({"text_length_filter": {"min_length": 3}}, ["text_length_filter", "min_length", "did you mean"]),
        ({"text_length_filter": {"min_len": "three"}}, ["min_len", "'int'", "'three'"]),
        ({"character_repetition_filter": {"rep_len": -1}}, ["character_repetition_filter.rep_len", "greater than 0"]),
        ({"image_shape_filter": {"any_or_all": "most"}}, ["image_shape_filter", "most"]),
        ({"image_size_filter": {"min_size": "big"}}, ["image_size_filter", "big"]),
        ({"text_length_filter": {"text_key": "caption"}}, ["text_key", "'text'", "'caption'"]),
        ({"video_duration_filter": {}}, ["video_duration_filter", "video"]),
        ({"image_deduplicator": {}}, ["image_deduplicator", "document_minhash_deduplicator"]),
        ({"ray_document_deduplicator": {}}, ["ray_document_deduplicator", "not supported"]),
        ({"image_ohem_selector": {}}, ["selector"]),
        ({"image_blur_mapper": {}}, ["image_blur_mapper", "image mapper"]),
    ],
)
def test_an_operator_that_cannot_run_is_named_with_the_reason(entry: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        dj.build([entry])
    assert all(part in str(caught.value) for part in says), str(caught.value)


def test_an_operator_whose_extra_is_missing_names_package_and_extra_and_installs_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """OpenCV is in none of captune's requirements; Data-Juicer would call pip in the middle of the run."""
    monkeypatch.setitem(sys.modules, "cv2", None)  # not importable even where somebody installed it
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("something was installed"))
    with pytest.raises(UserError) as caught:
        dj.build([{"image_face_ratio_filter": {}}])
    for part in ("image_face_ratio_filter", "opencv-contrib-python", "not installed", "py-data-juicer[vision]"):
        assert part in str(caught.value)


def test_a_package_that_is_missed_only_on_the_first_row_is_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """fix_unicode_mapper touches ftfy when it processes, not when it is built."""
    monkeypatch.setitem(sys.modules, "ftfy", None)
    operators = dj.build([{"fix_unicode_mapper": {}}])
    with pytest.raises(UserError, match=r"fix_unicode_mapper needs the package ftfy.*py-data-juicer\["):
        run_operators(operators, [Row("a", "text")])


def test_importing_data_juicer_leaves_pillow_strict() -> None:
    """data_juicer switches Pillow to accept truncated images for the whole process."""
    dj.load_data_juicer()
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_decisions_and_stats_equal_data_juicers_own() -> None:
    """The sample recipe's operators, run as Data-Juicer's executor runs them on its own sample format with files on
    disk.
    """
    texts = ["a yellow sign that says cafe above two red circles", "a white price tag of $5 below three green stars"]
    texts += [
        "a sign a sign a sign a sign",
        "photo photo photo photo photo photo",
        "image",
        "!!! ??? !!! $$$ ### @@@",
        "x" * 500,
    ]
    pictures = [
        jpeg(200, 160),
        jpeg(40, 200),
        jpeg(400, 90),
        jpeg(64, 64),
        jpeg(300, 300),
        jpeg(63, 80),
        jpeg(160, 160),
    ]
    process = dj.read_recipe(SAMPLE)
    operators = dj.build(process)
    rows = [Row(str(i), text, picture) for i, (text, picture) in enumerate(zip(texts, pictures, strict=True))]
    outcomes = run_operators(operators, rows)

    from data_juicer.core.data import NestedDataset
    from data_juicer.ops import load_ops

    expected: dict[str, str] = {}
    dataset = NestedDataset.from_dict(
        {
            "id": [row.sample_id for row in rows],
            "text": texts,
            "images": [[row.sample_id] for row in rows],
            "image_bytes": [[picture] for picture in pictures],
        }
    )
    alone = [
        {name: {**parameters, "auto_op_parallelism": False}} for entry in process for name, parameters in entry.items()
    ]
    alive = set(dataset["id"])
    for entry, op in zip(process, load_ops(alone), strict=True):
        dataset = op.run(dataset)
        for gone in alive - set(dataset["id"]):
            expected[gone] = next(iter(entry))
        alive = set(dataset["id"])
    assert {row.sample_id: o.step for row, o in zip(rows, outcomes, strict=True) if o.step} == expected
    assert len(set(expected.values())) >= 3 and alive  # the comparison means something
    theirs = {row["id"]: row["__dj__stats__"] for row in dataset.to_list()}
    for row, outcome in zip(rows, outcomes, strict=True):
        if outcome.step is None:
            assert set(outcome.stats) == set(theirs[row.sample_id])
            for name, value in outcome.stats.items():
                assert value == pytest.approx(theirs[row.sample_id][name], rel=1e-12), name


def test_reasons_are_readable() -> None:
    operators = dj.build([{"text_length_filter": {"min_len": 5}}, {"image_shape_filter": {"min_width": 64}}])
    rows = [
        Row("a", "abc", jpeg(90, 90)),
        Row("b", "a longer text", jpeg(32, 90)),
        Row("c", "fine text", image_uri="/no/file"),
    ]
    found = run_operators(operators, rows)
    assert [outcome.reason for outcome in found] == [
        "text_length_filter: text_len=3",
        "image_shape_filter: image_width=32, image_height=90",
        "error: missing file: /no/file",
    ]
    assert "image_width" not in found[0].stats  # it met no further operator


def test_text_filters_get_the_caption_without_the_image_token() -> None:
    """`<__dj__image>` is 12 characters of which 6 are special: with it every short caption would look like junk."""
    operators = dj.build(
        [{"special_characters_filter": {"max_ratio": 0.1}}, {"text_length_filter": {"min_len": 1, "max_len": 4}}]
    )
    assert [o.reason for o in run_operators(operators, [Row("a", "sign", jpeg(64, 64))])] == [None]
    similarity = dj.load_data_juicer()["image_text_similarity_filter"]
    assert dj._describe("x", "image_text_similarity_filter", similarity.__new__(similarity), "filter").wants_token


GOOD_CAPTIONS = [
    "a red stop sign in front of a house",
    "一个红色的停车标志",
    "赤い停止標識が家の前にあります。",
    "ป้ายหยุดสีแดงหน้าบ้าน",
    "빨간 정지 표지판이 집 앞에 있다",
    "красный знак остановки перед домом",
    "لافتة توقف حمراء أمام منزل",
]


def test_the_shipped_recipe_judges_captions_without_spaces() -> None:
    """Chinese is neither one word nor too short; a loop is found in it; Latin text is left to Data-Juicer's own eyes,
    and a tokenizer that a recipe names is not overruled.
    """
    process = [step for step in dj.read_recipe(SAMPLE) if not next(iter(step)).startswith("image_")]
    bad = ["红色标志" * 6, "标志", "a sign a sign a sign a sign", "sign", "红色的停车标志" * 80]
    found = run_operators(dj.build(process), [Row(text, text) for text in (*GOOD_CAPTIONS, *bad)])
    assert [outcome.reason for outcome in found[: len(GOOD_CAPTIONS)]] == [None] * len(GOOD_CAPTIONS)
    assert [outcome.step for outcome in found[len(GOOD_CAPTIONS) :]] == [
        "character_repetition_filter",
        "text_length_filter",
        "word_repetition_filter",
        "words_num_filter",
        "text_length_filter",
    ]
    loop = run_operators(dj.build([{"word_repetition_filter": {"rep_len": 2}}]), [Row("a", bad[0])])[0]
    assert loop.stats == {"word_rep_ratio": 1.0}
    counted = run_operators(dj.build([{"words_num_filter": {}}]), [Row("a", GOOD_CAPTIONS[1]), Row("b", "a red sign")])
    # Data-Juicer takes 一 for a dash
    assert [outcome.stats["num_words"] for outcome in counted] == [8, 3]


def test_mappers_change_the_text_and_later_filters_see_it() -> None:
    process: dj.Process = [
        {"clean_links_mapper": {}},
        {"whitespace_normalization_mapper": {}},
        {"text_length_filter": {"min_len": 1, "max_len": 10}},
    ]
    found = run_operators(
        dj.build(process), [Row("a", "red sign https://example.com/a/b"), Row("b", "https://example.com/a")]
    )
    assert (found[0].text.strip(), found[0].step) == ("red sign", None)
    assert found[1].reason == "clean_links_mapper: left no text"


def test_filters_of_fields_see_what_came_with_a_row() -> None:
    """Numbers, words and fields within fields; a row without the field is let go or costs itself, and nothing else."""
    fields = [{"similarity": 0.1 * n, "lang": "de" if n % 2 else "en", "meta": {"score": n + 1}} for n in range(4)]
    rows = [Row(str(n), "x", fields=each) for n, each in enumerate([*fields, {}])]
    for process, kept in (
        ({"general_field_filter": {"filter_condition": "similarity >= 0.15 and lang != 'en'"}}, ["3"]),
        ({"general_field_filter": {"filter_condition": "meta.score >= 3"}}, ["2", "3"]),
        ({"specified_field_filter": {"field_key": "lang", "target_value": ["de"]}}, ["1", "3"]),
        ({"specified_numeric_field_filter": {"field_key": "meta.score", "max_value": 2}}, ["0", "1"]),
    ):
        found = run_operators(dj.build([process]), rows)
        assert [row.sample_id for row, outcome in zip(rows, found, strict=True) if outcome.step is None] == kept


def test_numbers_are_read_as_data_juicer_reads_them(tmp_path: Path) -> None:
    """Published recipes say `max_len: 2e5`; quoted it is a text."""
    path = recipe(tmp_path, "process:\n  - text_length_filter: {min_len: 2, max_len: 2e5}\n")
    ((_, limits),) = dj.read_recipe(path)[0].items()
    assert limits == {"min_len": 2, "max_len": 200_000} and dj.build(dj.read_recipe(path))
    path = recipe(tmp_path, "process:\n  - x: {a: 1e-2, b: '2e5', c: 1.5, d: 1e}\n")
    assert dj.read_recipe(path) == [{"x": {"a": 0.01, "b": "2e5", "c": 1.5, "d": "1e"}}]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("general_fused_op", {"fused_op_list": []}),
        ("extract_keyword_mapper", {}),
        ("suffix_filter", {"suffixes": [".txt"]}),
    ],
)
def test_what_cannot_work_later_is_refused_when_it_is_read(name: str, parameters: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"refine.recipe: {name} "):
        dj.build([{name: parameters}])


def test_one_broken_image_costs_only_its_own_row() -> None:
    operators = dj.build([{"image_shape_filter": {"min_width": 10}}])
    found = run_operators(
        operators, [Row("a", "x", jpeg(64, 64)), Row("b", "x", jpeg(64, 64)[:300]), Row("c", "x", b"no image")]
    )
    assert found[0].step is None
    assert (found[1].reason or "").startswith("image_shape_filter: failed: OSError")
    assert (found[2].reason or "").startswith("image_shape_filter: failed: UnidentifiedImageError")


def test_an_operator_that_fails_on_every_row_stops_the_run() -> None:
    operators = dj.build([{"text_length_filter": {}}])
    operators[0].op.compute_stats_batched = lambda samples: 1 / 0
    with pytest.raises(WorkFailed, match="text_length_filter failed on all of 2 rows.*ZeroDivisionError"):
        run_operators(operators, [Row("a", "x"), Row("b", "y")])


def test_the_same_operator_twice_has_two_labels() -> None:
    built = dj.build([{"text_length_filter": {}}, {"words_num_filter": {}}, {"text_length_filter": {}}])
    assert [operator.label for operator in built] == ["text_length_filter", "words_num_filter", "text_length_filter#2"]
