"""Every layout of the page "Your data" is made as people have it and goes through `captune stats`; what the page
promises of it is what is read.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.errors import UserError
from pipelines.formats import Reading, Row, jsonlist, open_dataset, to_record
from pipelines.formats.texts import NOTE
from pipelines.records import new_record, write_shard
from ray_jobs import stats

Jpeg = Callable[[int], bytes]
Make = Callable[[Path, Jpeg], Path]
PAGE = Path(__file__).parents[3] / "pipelines" / "formats" / "README.md"
TURNS = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": "a red sign"}]


def rows_of(path: Path | str, **reading: Any) -> list[Row]:
    return list(open_dataset(path, Reading(**reading)).rows())


def put(folder: Path, files: dict[str, bytes | str]) -> Path:
    """Files below a folder, by name."""
    for name, contents in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(contents.encode() if isinstance(contents, str) else contents)
    return folder


def tar(members: list[tuple[str, bytes]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as found:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            found.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def table(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def _pictures(folder: Path, jpeg: Jpeg) -> Path:
    put(folder, {"a.jpg": jpeg(1), "sub/b.png": jpeg(2), ".git/c.jpg": jpeg(3), "notes.md": "x"})
    os.rename(folder / "sub" / "b.png", os.fsencode(folder / "sub") + b"/caf\xe9.png")
    return folder


def _beside(folder: Path, jpeg: Jpeg) -> Path:
    about = json.dumps({"caption": "two cups", "score": 0.3})
    put(folder, {"a.jpg": jpeg(1), "a.txt": "a red sign", "b.jpg": jpeg(2), "b.json": about})
    return put(folder, {"c.jpg": jpeg(3), "c.caption": "three", "c.json": '{"caption": "not this"}'})


def _metadata(folder: Path, jpeg: Jpeg) -> Path:
    lines = [{"file_name": "./b.jpg", "text": "two, cups"}, {"file_name": "d.jpg", "conversations": TURNS}]
    put(folder, {"metadata.csv": '\ufefffile_name,text,n\na.jpg,"a red,\nsign",5\n', "a.jpg": jpeg(1)})
    put(folder, {"s/b.jpg": jpeg(2), "s/d.jpg": jpeg(4), "s/e.jpg": jpeg(5), "t/c.jpg": jpeg(3)})
    table(folder / "t" / "metadata.parquet", file_name=["c.jpg"], text=["three"])
    return put(folder, {"s/metadata.jsonl": "\n".join(map(json.dumps, lines))})


def _text_table(folder: Path, jpeg: Jpeg) -> Path:
    text = 'image,caption\na.jpg,a red sign\na.jpg,"a sign, red"\n'
    return put(folder, {"captions.csv": text, "images/a.jpg": jpeg(1)})


def _data_juicer(folder: Path, jpeg: Jpeg) -> Path:
    text = "<__dj__image> a red sign <|__dj__eoc|>"
    line = json.dumps({"text": text, "images": ["images/a.jpg"], "n": 1})
    put(folder, {"images/a.jpg": jpeg(1), "paths.jsonl": line})
    table(folder / "t" / "paths.parquet", images=[["../images/a.jpg"]], text=[text])
    table(folder / "t" / "bytes.parquet", images=[["nowhere.jpg"]], image_bytes=[[jpeg(1)]], text=[text])
    for row in rows_of(folder / "t"):
        assert (row.caption, to_record(row)["error"]) == ("a red sign", None)
    return folder / "paths.jsonl"


def _llava(folder: Path, jpeg: Jpeg) -> Path:
    items = [{"id": "1", "image": "images/a.jpg", "conversations": TURNS}] * 3
    return put(folder, {"images/a.jpg": jpeg(1), "data.json": json.dumps(items, indent=1)})


def _lavis(folder: Path, jpeg: Jpeg) -> Path:
    items = [{"image": "a.jpg", "caption": "a red sign"}, {"image": "b.jpg", "caption": ["two cups", "cups"]}]
    return put(folder, {"a.jpg": jpeg(1), "b.jpg": jpeg(2), "karpathy.json": json.dumps(items)})


def _coco(folder: Path, jpeg: Jpeg) -> Path:
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}]
    annotations = [{"id": 7 + n, "image_id": 1, "caption": text} for n, text in enumerate(("a red sign", "red"))]
    value = json.dumps({"info": {}, "images": images, "annotations": annotations})
    return put(folder, {"images/a.jpg": jpeg(1), "images/b.jpg": jpeg(2), "captions.json": value})


def _webdataset(folder: Path, jpeg: Jpeg) -> Path:
    apart = [("./0.jpg", jpeg(0)), ("./1.jpg", jpeg(1)), ("./0.txt", b"zero"), ("./1.txt", b"one")]
    apart += [("./0.jpg", jpeg(2)), ("./0.txt", b"appended"), (os.fsdecode(b"caf\xe9.jpg"), jpeg(3))]
    whole = tar([("2.jpg", jpeg(2)), ("2.txt", b"two")])
    zst = pa.compress(whole, "zstd", asbytes=True)
    put(folder, {"0.tar": tar(apart), "1.tar.gz": gzip.compress(whole), "2.tar.zst": zst})
    return put(folder, {"3.tar": bz2.compress(whole), "4.tgz": gzip.compress(whole), "5.txz": lzma.compress(whole)})


def _img2dataset(folder: Path, jpeg: Jpeg) -> Path:
    about = json.dumps({"caption": "a red sign", "status": "success"}).encode()
    members = [("000000000.jpg", jpeg(1)), ("000000000.json", about), ("000000000.txt", b"a red sign")]
    files = folder.with_name("as_files")
    for each in (folder, files):
        table(each / "00000.parquet", url=["http://x/a.jpg"], caption=["a red sign"], status=["success"])
        put(each, {"00000_stats.json": "{}"})
    put(files, {"00000/a.jpg": jpeg(1), "00000/a.txt": "a red sign", "00000/a.json": about})
    assert [row.caption for row in rows_of(files)] == ["a red sign"]
    return put(folder, {"00000.tar": tar(members)})


def _parquet(folder: Path, jpeg: Jpeg) -> Path:
    struct = [{"bytes": jpeg(1), "path": "a.jpg"}]
    other = [[{"bytes": jpeg(9), "path": "x"}]]
    table(folder / "0.parquet", picture=struct, TEXT=["a red sign"], edited=other, n=[1])
    return table(folder / "1.parquet", JPG=[jpeg(2)], caption=[["two", "cups"]]).parent


def _hub(folder: Path, jpeg: Jpeg) -> Path:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        table(folder / "data" / f"{name}.parquet", image=[jpeg(1)], text=[name[:11]])
    return put(folder, {"README.md": "# data", "assets/teaser.jpg": jpeg(9)})


def _save_to_disk(folder: Path, jpeg: Jpeg) -> Path:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = {"image": [{"bytes": jpeg(1), "path": None}] * 70, "caption": [f"c{n}" for n in range(70)]}
    split = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": split, "test": split.select(range(3))}).save_to_disk(folder)
    written = next((folder / "train").glob("data-*.arrow"))
    return put(folder, {"train/cache-0a1b2c.arrow": written.read_bytes()})


def _records(folder: Path, jpeg: Jpeg) -> Path:
    write_shard(folder / "part-00000.parquet", [new_record("as found", image=jpeg(1))])
    return folder


LAYOUTS: dict[str, tuple[Make, list[str]]] = {
    "A folder of pictures": (_pictures, ["", ""]),
    "Texts beside pictures": (_beside, ["a red sign", "two cups", "three"]),
    "metadata.csv, metadata.jsonl or metadata.parquet": (
        _metadata,
        ["a red,\nsign", "two, cups", "a red sign", "", "three"],
    ),
    "A table in text": (_text_table, ["a red sign", "a sign, red"]),
    "Data-Juicer": (_data_juicer, ["a red sign"]),
    "LLaVA": (_llava, ["a red sign"] * 3),
    "LAVIS and BLIP": (_lavis, ["a red sign", "two cups", "cups"]),
    "COCO captions": (_coco, ["a red sign", "red", ""]),
    "WebDataset": (_webdataset, ["zero", "one", "appended", "", *["two"] * 5]),
    "img2dataset and NeMo Curator": (_img2dataset, ["a red sign"]),
    "Parquet": (_parquet, ["a red sign", "two", "cups"]),
    "A repository of the Hugging Face hub": (_hub, ["train-00000", "train-00001"]),
    "save_to_disk": (_save_to_disk, [f"c{n}" for n in range(70)]),
    "captune's records": (_records, ["as found"]),
}


@pytest.mark.parametrize("name", re.findall(r"^### (.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
def test_a_layout_of_the_page(name: str, tmp_path: Path, jpeg: Jpeg, capsys: pytest.CaptureFixture[str]) -> None:
    make, captions = LAYOUTS[name]
    path = make(tmp_path / "data", jpeg)
    rows = rows_of(path)
    assert [row.caption for row in rows] == captions
    for record in map(to_record, rows):
        assert record["error"] is None and (record["image"] or Path(record["image_uri"] or "").is_file())
        assert len(record["meta"]) < 1000 and "b'" not in record["meta"]
        pa.Table.from_pylist([record])
    assert stats.main(["--input", str(path), "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)
    assert (counted["rows"], counted["texts"]) == (len(captions), len(captions))
    assert open_dataset(path).identity() == open_dataset(path).identity()


def test_every_layout_is_on_the_page() -> None:
    assert set(LAYOUTS) == set(re.findall(r"^### (.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("name", LAYOUTS)
def test_damage_is_a_row_with_its_error_or_a_refusal(name: str, tmp_path: Path, jpeg: Jpeg) -> None:
    """Whatever happens to one of the files, and wherever: no other exception, and nothing that cannot be stored."""
    whole, draw = LAYOUTS[name][0](tmp_path / "data", jpeg), random.Random(name)
    folder = whole if whole.is_dir() else whole.parent
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for file in draw.choices([path for path in files if path.suffix not in (".jpg", ".png")] or files, k=25):
        contents = file.read_bytes()
        file.write_bytes(damaged(contents, draw))
        try:
            for row in open_dataset(whole).rows():
                pa.Table.from_pylist([{**to_record(row), "where": row.where}])
        except UserError:
            pass
        file.write_bytes(contents)


def damaged(contents: bytes, draw: random.Random) -> bytes:
    """Cut off, with other bytes in it, with something in between, or something else altogether."""
    data = bytearray(contents)
    kind, place = draw.randrange(4), draw.randrange(len(data) or 1)
    if kind == 0:
        del data[place:]
    elif kind == 1:
        for _ in range(draw.choice((1, 30)) if data else 0):
            data[draw.randrange(min(len(data), draw.choice((100, 1 << 20))))] = draw.randrange(256)
    elif kind == 2:
        data[place:place] = draw.choice((b"\0", b"\xff\xfe", b"null", b"[", b"{", b'"', b",,", b"\n", b"1e999"))
    else:
        data[:] = draw.choice((b"", b"null", b"[]", b"{}", b"[null]", b'{"images":[],"annotations":[]}', b"a,b\n1"))
    return bytes(data)


def test_what_could_be_meant_in_two_ways_is_refused(tmp_path: Path, jpeg: Jpeg) -> None:
    """With the names of both; a split of its own and an index beside its shard are no such thing."""
    both = put(tmp_path / "both", {"0.tar": tar([("0.jpg", jpeg(0))])})
    table(both / "other.parquet", image=[jpeg(1)])
    lists = put(tmp_path / "lists", {"a.jpg": jpeg(1)})
    for name in ("one", "two"):
        put(lists, {f"{name}.json": json.dumps([{"image": "a.jpg", "conversations": TURNS}])})
        table(tmp_path / "configurations" / name / "0.parquet", image=[jpeg(1)])
    for folder in (both, lists, tmp_path / "configurations"):
        with pytest.raises(
            UserError, match=f"{folder.name}: holds .*(one, two|one.json, two.json|0.tar, other.parquet)"
        ):
            open_dataset(folder)
    table(put(tmp_path / "mine", {"a.jpg": jpeg(1)}) / "backup" / "0.parquet", image=[jpeg(1)])
    with pytest.raises(UserError, match=r"mine: holds pictures, and a dataset in backup"):
        open_dataset(tmp_path / "mine")
    apart = tar([("0.jpg", jpeg(0)), ("1.jpg", jpeg(1)), ("0.txt", b"zero")])
    put(tmp_path, {"apart.tar.gz": gzip.compress(apart)})
    with pytest.raises(UserError, match="apart.tar.gz: not sorted, the files of sample '0' are apart"):
        rows_of(tmp_path / "apart.tar.gz")


def test_a_packed_tar_that_breaks_off_keeps_its_whole_samples(tmp_path: Path, jpeg: Jpeg) -> None:
    packed = gzip.compress(tar([(f"{n}.jpg", os.urandom(5000)) for n in range(9)]))
    put(tmp_path, {"a.tar.gz": packed[: len(packed) // 2]})
    *whole, last = rows_of(tmp_path / "a.tar.gz")
    assert len(whole) > 2 and {row.error for row in whole} == {None} and "breaks off" in (last.error or "")


def test_the_user_says_what_nobody_can_tell(tmp_path: Path, jpeg: Jpeg, capsys: pytest.CaptureFixture[str]) -> None:
    """Columns of any name, which of several captions, an encoding; a table without captions is said, with its columns.
    What is read otherwise is another input.
    """
    path = table(tmp_path / "t.parquet", foto=[jpeg(1)], prompt=[["one", "the longer", "one"]], n=[1])
    with pytest.raises(UserError, match="no image column.*foto, prompt, n.*--columns image=NAME"):
        rows_of(path)
    assert stats.main(["--input", str(path), "--json", "--columns", "image=foto"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["words"] == 0 and "it has foto, prompt, n" in captured.err
    assert stats.main([str(path), "--json", "--columns", "image=foto", "--columns", "caption=prompt"]) == 0
    assert json.loads(capsys.readouterr().out)["words"] == 3
    columns = {"image": "foto", "caption": "prompt"}
    for several, captions in (("first", ["one"]), ("longest", ["the longer"]), ("join", ["one the longer"])):
        assert [row.caption for row in rows_of(path, columns=columns, several=several)] == captions
    with pytest.raises(UserError, match="no column 'txt'; it has foto, prompt, n"):
        rows_of(path, columns={**columns, "caption": "txt"})
    identities = {open_dataset(path, Reading(**each)).identity() for each in ({}, {"columns": columns})}  # type: ignore[arg-type]
    assert len(identities) == 2
    put(tmp_path / "f", {"a.jpg": jpeg(1), "a.txt": "红色的标志".encode("gb18030")})
    (untold,), (told,) = rows_of(tmp_path / "f"), rows_of(tmp_path / "f", encoding="gb18030")
    assert untold.caption == "" and "caption.reading.encoding" in untold.meta[NOTE]
    assert told.caption == "红色的标志" and NOTE not in told.meta
    for wrong in ({"columns": {"text": "x"}}, {"several": "all"}, {"encoding": "klingon"}):
        with pytest.raises(UserError, match="caption.reading"):
            Reading(**wrong)  # type: ignore[arg-type]


def test_a_long_list_is_not_held(tmp_path: Path, jpeg: Jpeg, monkeypatch: pytest.MonkeyPatch) -> None:
    """Items come while the file is being read, wherever its pieces end; damage is an error after what came before."""
    monkeypatch.setattr(jsonlist, "_PIECE", 7)
    items = [{"image": "é.jpg", "conversations": TURNS, "n": n, "s": "\ud83d"} for n in range(5)]
    text = json.dumps(items, ensure_ascii=False).encode("utf-8", "surrogatepass").replace(b"\xed\xa0\xbd", b"\\ud83d")
    put(tmp_path, {"a.json": b"\xef\xbb\xbf" + text})
    rows = rows_of(tmp_path / "a.json")
    assert [row.meta["n"] for row in rows] == list(range(5)) and "surrogate" in rows[0].meta[NOTE]
    put(tmp_path, {"b.json": text[:-30]})
    found = open_dataset(tmp_path / "b.json").rows()
    assert next(found).caption == "a red sign"
    with pytest.raises(UserError, match="b.json: no LLaVA dataset"):
        list(found)
