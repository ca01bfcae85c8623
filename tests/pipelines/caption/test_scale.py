"""A dataset too large for memory is indexed, joined and written in parts; what comes of it is what one pass over all
rows would give.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import text
from pipelines.caption import index, partitions
from pipelines.caption.finish import write_records
from pipelines.caption.index import build_index, index_files
from pipelines.caption.partitions import Partitions, digits_for
from pipelines.caption.results import Results, Work, count_work
from pipelines.errors import UserError
from pipelines.formats import open_dataset, to_record
from pipelines.records import SAME_PICTURE, is_repeat, repeat_id
from pipelines.text import Texts, Vocabulary

from ..tiny_blip2 import picture
from .test_finish import commit


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """230 rows in three shards; contents come again within a shard and in another one, and some rows have no image."""
    pictures = [picture(seed, (16, 16)) for seed in range(40)]
    rows = [(pictures[n * 7 % 40], f"c{n * 7 % 40} of {n % 3}") for n in range(230)]
    folder = tmp_path / "data"
    folder.mkdir()
    for number, part in enumerate((rows[:90], rows[90:100], rows[100:])):
        images = [None if place % 41 == 40 else image for place, (image, _) in enumerate(part)]
        pq.write_table(pa.table({"image": images, "text": [t for _, t in part]}), folder / f"{number}.parquet")
    return folder


def commit_captions(results: Results, index: Path) -> None:
    """Some results twice, once without a caption, and one of a row that the dataset no longer has."""
    rows = [row for file in index_files(index) for row in pq.read_table(file).to_pylist() if not row["skip"]]
    said = [(row["sample_id"], f"about {row['caption']}", None) for row in rows]
    commit(results, "a_000000", said[::2])
    commit(results, "b_000001", [(key, None, "broken image: x") for key, *_ in said[:6]])
    commit(results, "c_000002", [*said[1::2], (said[0][0], "about another", None), ("f" * 32, "gone", None)])


def expected(folder: Path) -> list[dict[str, Any]]:
    """Records in the dataset's order, made in one pass that remembers every id and picture."""
    seen: Counter[str] = Counter()
    pictures: dict[bytes | None, dict[str, Any]] = {}
    records = []
    for row in open_dataset(folder).rows():
        record: dict[str, Any] = {**to_record(row)}
        key = record["sample_id"]
        seen[key] += 1
        if record["error"] is None:
            first = pictures.setdefault(row.image, record)
            record["recaption"] = "about another" if len(pictures) == 1 else f"about {first['caption']}"
            record["recaption"] = first["recaption"]
            record["candidates"] = [record["recaption"], "another"]
            record["stats"] = json.dumps({"candidate_scores": [0.5, 0.25]})
            if first["sample_id"] != key:
                record["meta"] = json.dumps({SAME_PICTURE: first["sample_id"]})
        record["sample_id"] = repeat_id(key, seen[key])
        records.append(record)
    return records


def test_parts_and_tasks_change_nothing(
    ray_cluster: None, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small partitions, a task for each file, shards across index files: records, counts and metrics are those of one
    pass.
    """
    found, contents = {}, len({row["image"] for row in expected(dataset) if row["error"] is None})
    for name in ("whole", "parts"):
        if name == "parts":
            monkeypatch.setattr(partitions, "ROWS", 8)
            monkeypatch.setattr(partitions, "_BUFFERED", 16)
            monkeypatch.setattr(index, "_SMALL_BYTES", 0)
            monkeypatch.setattr(text, "_FRESH_WORDS", 4)
            assert digits_for(230) == 2
        work = tmp_path / name / "_work"
        results = Results(work, "f")
        seen = build_index(open_dataset(dataset), work / "index")
        assert count_work(work / "index", results) == Work(contents, 0)
        commit_captions(results, work / "index")
        assert count_work(work / "index", results).done == contents
        facts = write_records(work / "index", results.tables(), tmp_path / name, 50)
        shards = sorted((tmp_path / name).glob("*.parquet"))
        found[name] = seen, facts, [pq.read_table(shard).to_pylist() for shard in shards]
        assert {path.name for path in work.iterdir()} == {"index", "shards", "checkpoint-f"}
    assert found["parts"] == found["whole"]
    seen, facts, shards = found["parts"]
    records = expected(dataset)
    assert [row for shard in shards for row in shard] == records
    assert [len(shard) for shard in shards] == [50, 50, 50, 50, 30]
    duplicates = sum(is_repeat(record["sample_id"]) and record["error"] is None for record in records)
    failed = sum(record["error"] is not None for record in records)
    assert (facts["rows_in"], facts["rows_out"], facts["duplicates"], facts["vanished"]) == (230, 230, duplicates, 1)
    assert facts["captioned"] == 230 - duplicates - failed > contents == 40
    assert facts["failed"] == {"bad row": failed} == seen.failed
    for column in ("caption", "recaption"):
        texts = Texts()
        texts.add([None if record["error"] else record[column] or "" for record in records])
        assert facts["metrics"][column] == texts.metrics()


def test_a_file_that_is_no_shard_ends_the_command_by_name(
    ray_cluster: None, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a task finds it."""
    monkeypatch.setattr(index, "_SMALL_BYTES", 0)
    (dataset / "1.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(UserError, match=r"1\.parquet: not a readable Parquet file"):
        build_index(open_dataset(dataset), tmp_path / "index")


def test_partitions_keep_order(tmp_path: Path) -> None:
    """Rows of an id stay in the order in which they came, however many tables and writes they came in."""
    rows = [(f"{n * 37 % 256:02x}{n % 3}", n) for n in range(1000)]
    schema = pa.schema([("key", pa.string()), ("n", pa.int64())])
    tables = [
        pa.table(dict(zip(("key", "n"), zip(*rows[s : s + 7], strict=True), strict=True)), schema=schema)
        for s in range(0, 1000, 7)
    ]
    with Partitions(tmp_path / "p", "key", 1, schema) as parts:
        parts.add(tables)
        assert parts.names() == set("0123456789abcdef")
        for name in parts.names():
            assert list(parts.table(name).to_pylist()) == [{"key": k, "n": n} for k, n in rows if k[0] == name]
        assert len(parts.table("x")) == 0
    assert not (tmp_path / "p").exists()


def test_vocabularies_of_parts_count_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_FRESH_WORDS", 10)
    whole, merged = Vocabulary(), Vocabulary()
    for part in range(9):
        words, piece = [f"w{n * n % 97}" for n in range(part * 20, part * 20 + 30)], Vocabulary()
        for vocabulary in (whole, piece):
            vocabulary.add(words)
        merged.merge(piece)
        assert len(merged) == len(whole) == len({f"w{n * n % 97}" for n in range(part * 20 + 30)})
