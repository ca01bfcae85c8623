"""Every format: what is written reads back, a bad row stays a row, and only what is no dataset at all is refused."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.errors import UserError
from pipelines.formats import Row, error_kind, llava, open_dataset, to_record
from pipelines.formats.export import export
from pipelines.formats.texts import NOTE
from pipelines.manifest import open_stage
from pipelines.records import SAME_PICTURE, Record, new_record, text_id, write_shard

Jpeg = Callable[[int], bytes]


def rows_of(path: Path) -> list[Row]:
    return list(open_dataset(path).rows())


@pytest.fixture
def records(tmp_path: Path, jpeg: Jpeg) -> Path:
    """A finished stage's output: a picture on disk, one held as bytes, one failed, one rejected."""
    (tmp_path / "pictures").mkdir()
    file = tmp_path / "pictures" / "a b.jpg"
    file.write_bytes(jpeg(1))
    on_disk = new_record("as found", image_uri=str(file), content=jpeg(1), meta={"tag": "é", "n": 1})
    held = new_record("held", image=jpeg(2), meta={})
    failed = new_record("failed", image_uri="/nowhere.jpg", error="missing file: /nowhere.jpg")
    rejected = new_record("rejected", image=jpeg(3))
    on_disk["recaption"], held["recaption"], rejected["recaption"] = "a red sign", "two circles", "junk"
    rejected["keep"], rejected["reject_reason"] = False, "words_num"
    stage = open_stage(tmp_path / "captions", "caption", {})
    write_shard(tmp_path / "captions" / "part-00000.parquet", [on_disk, held, failed, rejected])
    stage.finish()
    return tmp_path / "captions"


@pytest.mark.parametrize(
    ("format", "name"),
    [
        ("datajuicer", "set.jsonl"),
        ("llava", "set.json"),
        ("webdataset", "set.tar"),
        ("parquet", "set.parquet"),
        ("parquet", "shards"),
    ],
)
def test_round_trip(records: Path, tmp_path: Path, jpeg: Jpeg, format: str, name: str) -> None:
    """Exported pairs come back with their pictures, texts and meta; failed and rejected rows stay behind, and are
    counted.
    """
    facts = export(records, tmp_path / "out" / name, format)
    assert (facts["rows_in"], facts["written"], facts["left_out"]) == (4, 2, 2)
    assert open_dataset(tmp_path / "out" / name).format == format
    rows = rows_of(tmp_path / "out" / name)
    assert {row.caption for row in rows} == {"a red sign", "two circles"} and all(row.error is None for row in rows)
    pictures = {row.caption: row.image or Path(row.image_uri or "").read_bytes() for row in rows}
    assert pictures == {"a red sign": jpeg(1), "two circles": jpeg(2)}
    if format != "llava":  # LLaVA's items have no place for anything else
        tagged = next(row for row in rows if row.caption == "a red sign")
        assert tagged.meta["tag"] == "é" and tagged.meta["n"] == 1


def test_export_is_asked_the_right_thing(records: Path, tmp_path: Path) -> None:
    """The text can be chosen; an unknown format, a column that is none and an unfinished stage are named."""
    export(records, tmp_path / "x.jsonl", "datajuicer", text="caption")
    assert {row.caption for row in rows_of(tmp_path / "x.jsonl")} == {"as found", "held"}
    with pytest.raises(UserError, match="--format must be one of"):
        export(records, tmp_path / "y", "excel")
    with pytest.raises(UserError, match="--text must be"):
        export(records, tmp_path / "y", "llava", text="stats")
    (records / "MANIFEST.json").unlink()
    for refused in (lambda: export(records, tmp_path / "y", "llava"), lambda: open_dataset(records)):
        with pytest.raises(UserError, match="captune caption has not finished"):
            refused()


def test_export_is_the_mirror(tmp_path: Path, jpeg: Jpeg) -> None:
    """Rows of several texts of a sample stay apart in a tar; what a caption itself says is no token; a picture is named
    by its contents.
    """
    sample, avif = new_record("x", image=jpeg(1), meta={"conversations": TURNS[:1]}), io.BytesIO()
    Image.new("RGB", (8, 8)).save(avif, "AVIF")
    said = "a sign says <image> <__dj__image> <|__dj__eoc|>"
    rows = [sample, {**sample, "sample_id": text_id(sample["sample_id"], 1)}, new_record("y", image=avif.getvalue())]
    stage = open_stage(tmp_path / "captions", "caption", {})
    write_shard(tmp_path / "captions" / "part-0.parquet", [{**row, "recaption": said} for row in rows])  # type: ignore[list-item,typeddict-item]
    stage.finish()
    for format, name in (("webdataset", "a.tar"), ("llava", "a.json"), ("datajuicer", "a.jsonl")):
        export(tmp_path / "captions", tmp_path / name, format)
        assert len(rows_of(tmp_path / name)) == 3
    with tarfile.open(tmp_path / "a.tar") as tar:
        names = [name for name in tar.getnames() if not name.endswith((".txt", ".json"))]
    assert sorted(name.rpartition(".")[2] for name in names) == ["avif", "jpg", "jpg"]
    assert all(name.count(".") == 1 for name in names)
    assert [row.caption for row in rows_of(tmp_path / "a.tar")] == [said] * 3
    for item in json.loads((tmp_path / "a.json").read_text()):
        asked, answered = (turn["value"] for turn in item["conversations"])
        assert (asked.count("<image>"), answered.count("<image>")) == (1, 0) and "a sign says" in answered
    for line in (tmp_path / "a.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        assert (text.count("<__dj__image>"), text.count("<|__dj__eoc|>")) == (1, 1)


def test_webdataset_bytes_are_the_same_every_time(records: Path, tmp_path: Path) -> None:
    export(records, tmp_path / "1.tar", "webdataset")
    export(records, tmp_path / "2.tar", "webdataset")
    assert (tmp_path / "1.tar").read_bytes() == (tmp_path / "2.tar").read_bytes()


def test_jsonl_rows_of_every_kind(tmp_path: Path) -> None:
    """Each damaged line is one row whose error names file and line; special tokens leave the caption, other keys stay
    in meta.
    """
    lines = [
        b'\xef\xbb\xbf{"text": "<__dj__image> a sign <|__dj__eoc|>", "images": ["i/1.jpg"], "id": 7}',
        b"",
        b"no json",
        b'{"text": "x"}',
        b'{"text": "x", "images": []}',
        b'{"text": "x", "images": ["1.jpg", "2.jpg"]}',
        b'{"text": "x", "images": [3]}',
        b'["a", "list"]',
        b'{"text": "x", "images": ["https://example.org/1.jpg"]}',
        b'{"text": "x", "images": ["file:///etc/passwd"]}',
        b'{"images": ["/abs/2.jpg"]}',
    ]
    path = tmp_path / "set.jsonl"
    path.write_bytes(b"\n".join(lines))
    rows = rows_of(path)
    assert len(rows) == 10  # the blank line is none
    assert rows[0].caption == "a sign" and rows[0].meta == {"id": 7} and rows[0].image_uri == str(tmp_path / "i/1.jpg")
    assert rows[-1].error is None and rows[-1].image_uri == "/abs/2.jpg" and rows[-1].caption == ""
    reasons = [
        "not valid JSON",
        "lacks 'images'",
        "lacks 'images'",
        "names 2 images",
        "not a list of file names",
    ]
    reasons += ["a JSON list", "address of the web", "address of the web"]
    for number, (row, reason) in enumerate(zip(rows[1:-1], reasons, strict=True), start=3):
        assert row.error is not None and reason in row.error and f"set.jsonl:{number})" in row.error
    records = [to_record(row) for row in rows]
    assert len({record["sample_id"] for record in records}) == 10 and all(record["error"] for record in records)
    assert error_kind(records[0]["error"] or "") == "missing file" and "set.jsonl:1)" in (records[0]["error"] or "")
    json.dumps(records, ensure_ascii=False).encode()


TURNS = [
    {"from": "human", "value": "<image>\nWhat?"},
    {"from": "gpt", "value": " a sign "},
    {"from": "gpt", "value": "more"},
]
BROKEN_ITEMS = [
    ({"image": "a.jpg"}, "'conversations' is not a list"),
    ({"image": "a.jpg", "conversations": ["hi", "yes"]}, "turn 0 is not a 'from'"),
    ({"image": "a.jpg", "conversations": [TURNS[0], None]}, "turn 1 is not a 'from'"),
    ({"image": "a.jpg", "conversations": [{"from": ["human"], "value": "a"}]}, "turn 0 is not a 'from'"),
    ({"image": "a.jpg", "conversations": [{"from": "human", "value": 3}]}, "turn 0 is not a 'from'"),
    ({"image": {"path": "a.jpg"}, "conversations": TURNS}, "'image' is not a file name"),
    ({"image": 5, "conversations": TURNS}, "'image' is not a file name"),
    ({"image": ["a.jpg", 5], "conversations": TURNS}, "not a picture's name: 5"),
    (5, "JSON int"),
]


@pytest.mark.parametrize("lines", [False, True])
def test_llava_items_of_every_kind(tmp_path: Path, jpeg: Jpeg, lines: bool) -> None:
    """The first answer is the caption; pictures may lie in `images/`; an item without its parts is an error row with
    its place; one without a picture can be trained on and not be captioned.
    """
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "b.jpg").write_bytes(jpeg(1))
    items = [
        {"id": "1", "image": "a.jpg", "conversations": TURNS},
        {"image": ["b.jpg"], "conversations": [{"from": "user", "value": "?"}, {"from": "assistant", "value": "x"}]},
        {"conversations": TURNS},
        *(item for item, _ in BROKEN_ITEMS),
    ]
    path = tmp_path / ("set.jsonl" if lines else "set.json")
    path.write_text("\n".join(map(json.dumps, items)) if lines else json.dumps(items))
    good, beside, text_only, *broken = rows_of(path)
    assert good.caption == "a sign" and good.meta["conversations"] == TURNS and good.error is None
    assert good.image_uri == str(tmp_path / "a.jpg") and beside.image_uri == str(tmp_path / "images" / "b.jpg")
    assert beside.caption == "x" and text_only.error is None and text_only.image_uri is None
    place = "set.jsonl:3" if lines else "set.json row 2"
    assert to_record(text_only)["error"] == f"bad row: it has no image ({place})"
    for row, (_, reason) in zip(broken, BROKEN_ITEMS, strict=True):
        assert reason in (row.error or "") and row.error == to_record(row)["error"]


def test_lines_of_llava_and_of_data_juicer_are_told_apart(records: Path, tmp_path: Path) -> None:
    """Data-Juicer's lines may carry conversations in their meta; the keys that make a line Data-Juicer's win."""
    (tmp_path / "llava.jsonl").write_text(json.dumps({"id": 1, "conversations": TURNS}) + "\n")
    line = {"conversations": TURNS, "text": "x", "images": ["a.jpg"]}
    (tmp_path / "dj.jsonl").write_text(json.dumps(line) + "\n")
    assert open_dataset(tmp_path / "llava.jsonl").format == "llava"
    assert open_dataset(tmp_path / "dj.jsonl").format == "datajuicer"


@pytest.mark.parametrize(
    ("conversations", "asked"),
    [
        ([TURNS[0], TURNS[1]], TURNS[0]["value"]),
        (TURNS, llava.REQUEST),
        ([{"from": "human", "value": "What is this?"}, TURNS[1]], "<image>\nWhat is this?"),
        ([{"from": "human", "value": "<image> or <image>?"}, TURNS[1]], llava.REQUEST),
        ([None, 3], llava.REQUEST),
        (None, llava.REQUEST),
    ],
)
def test_a_caption_is_taught_with_the_samples_own_request(conversations: Any, asked: str) -> None:
    """Where the request is not about the one picture, LLaVA's own wording takes its place; either has exactly one
    placeholder, whatever the caption says.
    """
    request, answer = llava.about("a sign that says <image>", conversations)
    assert (request, answer) == (("user", asked), ("assistant", "a sign that says < image>"))


def test_coco_captions(tmp_path: Path, jpeg: Jpeg) -> None:
    """A row an annotation; pictures may lie in `images/`; one without a caption is a row."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "b.jpg").write_bytes(jpeg(1))
    images = [{"id": 1, "file_name": "a.jpg", "height": 5}, {"id": 2, "file_name": "b.jpg"}, {"id": "3"}]
    annotations = [{"image_id": 1, "id": 7, "caption": " one "}, {"image_id": 1, "id": 8, "caption": None}]
    annotations.append({"image_id": 9, "id": 9, "caption": "lost"})
    value = {"info": {}, "images": images, "annotations": annotations}
    path = tmp_path / "captions.json"
    for text in (json.dumps(value), json.dumps(value, indent=1), json.dumps({"images": images, **value})):
        path.write_text(text)
        assert open_dataset(path).format == "coco"
        one, again, lost, bare, nameless = rows_of(path)
        assert (one.caption, one.image_uri, again.caption) == ("one", str(tmp_path / "a.jpg"), "")
        assert one.meta == {"id": 1, "height": 5, "annotation_id": 7} and again.error is None
        assert (bare.caption, bare.image_uri) == ("", str(tmp_path / "images" / "b.jpg"))
        assert "no image has its id, 9 (captions.json annotation 2)" in (lost.error or "")
        assert "no 'file_name'" in (nameless.error or "")
    for wrong in ({"images": [{"id": 1}], "annotations": [{"bbox": []}]}, {"info": {}, "images": images}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=r"captions.json: .*COCO"):
            rows_of(path)
    (tmp_path / "one.json").write_text('{"images": ["a.jpg"], "text": "x"}')
    assert open_dataset(tmp_path / "one.json").format == "datajuicer"


def test_webdataset_with_faults(tmp_path: Path, jpeg: Jpeg) -> None:
    """A sample without a picture or with two is an error row; a tar that breaks off keeps its whole samples and says
    where.
    """
    path = tmp_path / "a.tar"
    members = [
        ("x/1.jpg", jpeg(1)),
        ("x/1.txt", b" one "),
        ("x/2.txt", b"alone"),
        ("x/3.png", jpeg(2)),
        ("x/3.jpg", jpeg(3)),
    ]
    members += [
        ("x/4.jpg", jpeg(4)),
        ("x/4.json", b'{"caption": "four", "k": 1}'),
        ("x/5.jpg", jpeg(5)),
        ("x/5.json", b"{"),
    ]
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    one, two, three, four, five = rows_of(path)
    assert (one.caption, one.image, one.error) == ("one", jpeg(1), None) and one.meta == {"__key__": "x/1"}
    assert "lacks an image (a.tar/x/2)" in (two.error or "") and "holds 2 images" in (three.error or "")
    assert four.caption == "four" and four.meta["k"] == 1
    assert five.error is None and "its JSON is not valid JSON" in five.meta[NOTE]
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(jpeg(4)) + 100])
    assert [row.error is None for row in rows_of(path)] == [True, False, False, False]
    assert "breaks off" in (rows_of(path)[-1].error or "") and "(a.tar/x/4)" in (rows_of(path)[-1].error or "")
    start = whole.index(b"x/4.jpg")
    path.write_bytes(whole[:start] + b"garbage" * 200)
    assert [row.error is None for row in rows_of(path)] == [True, False, False, False]
    assert "no valid header" in (rows_of(path)[-1].error or "")


def test_several_images_of_a_row_are_all_there_and_no_caption(tmp_path: Path, jpeg: Jpeg) -> None:
    """In their order, from a list of names in JSON and JSONL and from Hugging Face's structs in Parquet; captioning has
    no use for such a row and says so. Conversations about no image are rows of text.
    """
    for number in (1, 2):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    names = [str(tmp_path / "2.jpg"), str(tmp_path / "1.jpg")]
    (tmp_path / "a.json").write_text(json.dumps([{"image": ["2.jpg", "1.jpg"], "conversations": TURNS}]))
    (tmp_path / "b.jsonl").write_text(json.dumps({"images": ["2.jpg", "1.jpg"], "conversations": TURNS}))
    structs = [{"bytes": jpeg(2), "path": "x"}, {"bytes": None, "path": "1.jpg"}]
    pq.write_table(pa.table({"images": [structs, []], "conversations": [TURNS, TURNS]}), tmp_path / "c.parquet")
    (listed,), (lined,), (table, text) = (rows_of(tmp_path / name) for name in ("a.json", "b.jsonl", "c.parquet"))
    assert list(listed.pictures) == list(lined.pictures) == names and list(table.pictures) == [jpeg(2), names[1]]
    for row in (listed, lined, table):
        assert row.error is None and "it has 2 images, and a caption is about one" in (to_record(row)["error"] or "")
    assert text.error is None and text.pictures == () and "has no image" in (to_record(text)["error"] or "")


def test_parquet_tables_and_records(tmp_path: Path, jpeg: Jpeg) -> None:
    """Bytes, Hugging Face's image struct and paths are all images; other columns become meta; records keep their
    errors.
    """
    pq.write_table(pa.table({"image": [jpeg(1), None], "text": ["t", "u"], "n": [1, 2]}), tmp_path / "bytes.parquet")
    good, empty = rows_of(tmp_path / "bytes.parquet")
    assert (good.image, good.caption, good.meta) == (jpeg(1), "t", {"n": 1})
    assert "no single image (bytes.parquet:1)" in (empty.error or "")
    pq.write_table(pa.table({"image": [{"bytes": jpeg(2), "path": None}], "caption": ["c"]}), tmp_path / "hf.parquet")
    assert rows_of(tmp_path / "hf.parquet")[0].image == jpeg(2)
    pq.write_table(pa.table({"image": ["i.jpg", "http://x/i.jpg"], "caption": ["c", None]}), tmp_path / "paths.parquet")
    path, remote = rows_of(tmp_path / "paths.parquet")
    assert path.image_uri == str(tmp_path / "i.jpg") and error_kind(remote.error or "") == "remote image"
    failed: Record = new_record(
        "c", image_uri="/x.jpg", error="missing file: /x.jpg", meta={"k": "v", SAME_PICTURE: "gone"}
    )
    write_shard(tmp_path / "records" / "part-00000.parquet", [failed])
    row = rows_of(tmp_path / "records")[0]
    assert (
        row.error == "missing file: /x.jpg"
        and row.meta == {"k": "v"}
        and to_record(row)["sample_id"] == failed["sample_id"]
    )


def test_parquet_damage_in_the_middle_loses_no_row(tmp_path: Path, jpeg: Jpeg) -> None:
    """A shard whose footer is whole and whose pages are not gives its good rows, and an error row for each of the
    others.
    """
    file = tmp_path / "a.parquet"
    table = pa.table({"image": [jpeg(n) for n in range(200)], "text": [f"c{n}" for n in range(200)]})
    pq.write_table(table, file, row_group_size=100)
    second = pq.ParquetFile(file).metadata.row_group(1).column(0)
    data = bytearray(file.read_bytes())
    start = second.dictionary_page_offset or second.data_page_offset
    data[start : start + 400] = b"\xff" * 400
    file.write_bytes(data)
    rows = rows_of(file)
    assert len(rows) == 200 and [row.caption for row in rows[:64]] == [f"c{n}" for n in range(64)]
    bad = [row for row in rows if row.error is not None]
    assert len(bad) >= 100 and all("its shard cannot be read from row" in (row.error or "") for row in bad)
    assert "(a.parquet:199)" in (bad[-1].error or "")


def test_imagefolder_captions(tmp_path: Path, jpeg: Jpeg) -> None:
    """Captions from a .txt of the same name or metadata.jsonl; hidden files are no pictures; what metadata names in
    vain is a row.
    """
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("b.jpg", "a.PNG", "sub/c.jpeg", ".git/x.jpg", ".hidden.jpg", "notes.md"):
        (tmp_path / name).write_bytes(jpeg(1))
    (tmp_path / "b.txt").write_text("from txt\n")
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "sub/c.jpeg", "text": "from metadata", "k": 1}\n{"file_name": "gone.jpg", "text": "g"}\nbroken\n'
    )
    dataset = open_dataset(tmp_path)
    rows = list(dataset.rows())
    assert dataset.format == "imagefolder"
    assert [(row.where, row.caption) for row in rows[:3]] == [
        ("a.PNG", ""),
        ("b.jpg", "from txt"),
        ("sub/c.jpeg", "from metadata"),
    ]
    assert rows[2].meta == {"k": 1}
    assert [error_kind(to_record(row)["error"] or "") for row in rows[3:]] == ["missing file", "bad row"]


def test_what_is_no_dataset_is_refused_by_name(tmp_path: Path, jpeg: Jpeg) -> None:
    """A path that no reader can make sense of is the user's to fix, and the message names it."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "prose.jsonl").write_text("call me Ishmael\n" * 200)
    (tmp_path / "object.json").write_text("[1")
    (tmp_path / "pretty.jsonl").write_text(json.dumps({"text": "x", "images": ["i/1.jpg"]}, indent=1))
    (tmp_path / "fake.tar").write_text("no tar")
    (tmp_path / "fake.parquet").write_text("no parquet")
    (tmp_path / "one.jpg").write_bytes(jpeg(1))
    pq.write_table(pa.table({"a": [1]}), tmp_path / "numbers.parquet")
    for name in (
        "nowhere",
        "empty",
        "empty.jsonl",
        "prose.jsonl",
        "object.json",
        "pretty.jsonl",
        "fake.tar",
        "fake.parquet",
        "one.jpg",
        "numbers.parquet",
    ):
        with pytest.raises(UserError, match=name):
            rows_of(tmp_path / name)
    with pytest.raises(UserError, match=r"caf\\xe9: this name is no UTF-8"):
        open_dataset(tmp_path / os.fsdecode(b"caf\xe9"))
    with pytest.raises(UserError, match="https://example.org/set.tar: captune reads datasets from folders and from s3"):
        open_dataset("https://example.org/set.tar")


def test_a_folder_around_one_dataset_is_that_dataset(tmp_path: Path) -> None:
    """The sample world's folder holds a JSONL, a JSON and pictures: the pairs are meant."""
    line = '{"text": "x", "images": ["1.jpg"]}\n'
    (tmp_path / "dataset.jsonl").write_text(line)
    (tmp_path / "instruct.json").write_text("[]")
    assert open_dataset(tmp_path).path.name == "dataset.jsonl"
    (tmp_path / "dataset.jsonl").rename(tmp_path / "one.jsonl")
    (tmp_path / "two.jsonl").write_text(line)
    with pytest.raises(UserError, match="several datasets"):
        open_dataset(tmp_path)


def test_identity_follows_contents_not_places(tmp_path: Path, jpeg: Jpeg) -> None:
    """A moved folder is the same input; a changed caption or picture is another."""
    identities = []
    for number, (name, caption) in enumerate((("a", "x"), ("b", "x"), ("b", "y"))):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "1.jpg").write_bytes(jpeg(1))
        (folder / "1.txt").write_text(caption)
        identities.append(open_dataset(folder).identity())
        assert len(set(identities)) == (1 if number < 2 else 2)
    (tmp_path / "b" / "1.jpg").write_bytes(jpeg(200))
    assert open_dataset(tmp_path / "b").identity() not in identities
