"""A picture is not lost because its old caption or its metadata is odd, and nothing odd is a caption in silence."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.formats import Row, open_dataset, to_record
from pipelines.formats.texts import NOTE, captions_of, decode

Jpeg = Callable[[int], bytes]
VALUES = [
    (None, "", ""),
    (" a tile ", "a tile", ""),
    (7, "", "of type int"),
    ({"en": "a tile"}, "", "of type dict"),
    (["", "a tile", " "], "a tile", ""),
    ([], "", ""),
    ([{"raw": "a tile", "id": 3}], "a tile", ""),
    ([3], "", "of type int"),
]


@pytest.mark.parametrize(
    ("data", "text", "odd"),
    [
        ("a café".encode(), "a café", ""),
        ("a café".encode("utf-8-sig"), "a café", ""),
        ("a café, grün".encode("cp1252"), "a café, grün", "Windows-1252"),
        ("a grün tile".encode("utf-16"), "a grün tile", "UTF-16"),
        ("a grün tile".encode("utf-16-le"), "a grün tile", "UTF-16"),
        ("a grün tile".encode("utf-16-be"), "a grün tile", "UTF-16"),
        ("红色的标志".encode("gb18030"), "", "unknown encoding"),
        ("赤い標識".encode("shift_jis"), "", "unknown encoding"),
        ("红色的标志".encode(), "红色的标志", ""),
        (b"a\0 tile", "a tile", "NULs"),
        (b"", "", ""),
    ],
)
def test_text_of_many_encodings(data: bytes, text: str, odd: str) -> None:
    found, note = decode(data)
    assert found == text and odd in note and bool(odd) == bool(note)


def good(rows: list[Row], captions: list[str], odd: list[str]) -> None:
    """All pictures are there, with these captions and notes."""
    records = [to_record(row) for row in rows]
    assert [record["error"] for record in records] == [None] * len(captions)
    assert [record["caption"] for record in records] == captions
    for row, words in zip(rows, odd, strict=True):
        assert words in row.meta.get(NOTE, "") and bool(words) == (NOTE in row.meta)
    json.dumps(records, default=len, ensure_ascii=False).encode()


@pytest.mark.parametrize(("value", "caption", "odd"), VALUES)
def test_whatever_stands_for_a_caption(value: Any, caption: str, odd: str) -> None:
    found, note = captions_of(value)
    assert found == [caption] * bool(caption) and odd in note and bool(odd) == bool(note)


def test_lines(tmp_path: Path, jpeg: Jpeg) -> None:
    """Values of every kind, a line in another encoding, half a surrogate pair."""
    (tmp_path / "1.jpg").write_bytes(jpeg(1))
    lines = [json.dumps({"text": value, "images": ["1.jpg"]}).encode() for value, _, _ in VALUES]
    lines += [
        '{"text": "a café", "images": ["1.jpg"]}'.encode("cp1252"),
        '{"text": "红色的标志", "images": ["1.jpg"], "k": "一些文字"}'.encode("gb18030"),
        b'{"text": "a \\ud83d tile", "images": ["1.jpg"], "k\\udc00": 1}',
    ]
    (tmp_path / "set.jsonl").write_bytes(b"\n".join(lines))
    captions = [caption for _, caption, _ in VALUES] + ["a café", "", "a  tile"]
    odd = [words for _, _, words in VALUES] + ["Windows-1252", "unknown encoding", "surrogate"]
    good(list(open_dataset(tmp_path / "set.jsonl").rows()), captions, odd)


def test_llava_answers(tmp_path: Path, jpeg: Jpeg) -> None:
    (tmp_path / "1.jpg").write_bytes(jpeg(1))
    asked = {"from": "human", "value": "<image>\nWhat?"}
    items = [{"image": "1.jpg", "conversations": [asked, {"from": "gpt", "value": value}]} for value in (None, 7, "x")]
    (tmp_path / "set.json").write_text(json.dumps(items))
    good(list(open_dataset(tmp_path / "set.json").rows()), ["", "", "x"], ["", "", ""])


def test_tar(tmp_path: Path, jpeg: Jpeg) -> None:
    members = {
        "0.jpg": jpeg(0), "0.txt": b"a blue tile", "0.json": b'{"caption": "x", }',
        "1.jpg": jpeg(1), "1.txt": "a café".encode("cp1252"),
        "2.jpg": jpeg(2), "2.json": b'{"caption": ["one", "two"], "k": 1}',
    }  # fmt: skip
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    rows = list(open_dataset(tmp_path / "a.tar").rows())
    good(rows, ["a blue tile", "a café", "one", "two"], ["its JSON is not valid JSON", "Windows-1252", "", ""])


def test_folder(tmp_path: Path, jpeg: Jpeg) -> None:
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    (tmp_path / "0.txt").write_bytes("a café".encode("cp1252"))
    (tmp_path / "1.txt").write_bytes("a grün tile".encode("utf-16"))
    lines = [{"file_name": "2.jpg", "text": None, "caption": 5}, {"file_name": "3.jpg", "text": ["a", "b"]}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    odd = ["Windows-1252", "UTF-16", "of type int", "", ""]
    good(list(open_dataset(tmp_path).rows()), ["a café", "a grün tile", "", "a", "b"], odd)


def test_parquet(tmp_path: Path, jpeg: Jpeg) -> None:
    """Text that is no UTF-8 in a column of strings, lists, bytes; and a date beyond Python's calendar beside it."""
    pictures = pa.array([jpeg(1), jpeg(2)])
    western = pa.array(["a café".encode("cp1252"), b"fine"])
    broken = pa.Array.from_buffers(pa.string(), 2, western.buffers())
    when = pa.array([2**62, 0], pa.timestamp("us"))
    for name, texts, captions, odd in (
        ("strings", broken, ["a café", "fine"], ["Windows-1252", ""]),
        ("bytes", western, ["a café", "fine"], ["Windows-1252", ""]),
        ("lists", pa.array([["a", "b"], None]), ["a", "b", ""], ["", "", ""]),
    ):
        pq.write_table(pa.table({"image": pictures, "text": texts, "when": when}), tmp_path / f"{name}.parquet")
        good(list(open_dataset(tmp_path / f"{name}.parquet").rows()), captions, odd)
