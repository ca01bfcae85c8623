"""Sample records: keys that follow contents, and shards that are whole or absent."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.errors import UserError
from pipelines.records import COLUMNS, iter_records, new_record, read_shards, sample_id, schema, write_shard


def test_key_follows_content_only() -> None:
    """The key survives another folder and another way of holding the bytes; picture and caption both decide it."""
    held = new_record("c", image=b"bytes")
    on_disk = new_record("c", image_uri="/a/1.jpg", content=b"bytes")
    moved = new_record("c", image_uri="/b/2.jpg", content=b"bytes")
    assert held["sample_id"] == on_disk["sample_id"] == moved["sample_id"]
    assert on_disk["image"] is None
    others = {
        sample_id(b"bytes", None, "d"),
        sample_id(b"other", None, "c"),
        sample_id(None, "1.jpg", "c"),
        held["sample_id"],
    }
    assert len(others) == 4
    assert sample_id(None, "/a/1.jpg", "c") == sample_id(None, "/b/1.jpg", "c")


def test_shards_read_back_sorted(tmp_path: Path) -> None:
    """The shard layout never shows: records come back by id, with every column and type."""
    records = [new_record(f"caption {i}", image=bytes([i]), meta={"é": i}) for i in range(5)]
    records[0]["candidates"], records[1]["keep"] = ["x", "y"], False
    write_shard(tmp_path / "b.parquet", records[:2])
    write_shard(tmp_path / "a.parquet", records[2:])
    assert read_shards(tmp_path).schema.names == list(COLUMNS) == schema().names
    assert list(iter_records(tmp_path)) == sorted(records, key=lambda record: record["sample_id"])
    assert json.loads(records[4]["meta"]) == {"é": 4}
    assert not list(tmp_path.glob("*.part"))


def test_bad_shards_are_named(tmp_path: Path) -> None:
    """No shard, half a shard, another table: each names the file."""
    with pytest.raises(UserError, match="no Parquet shards"):
        read_shards(tmp_path)
    write_shard(tmp_path / "half.parquet", [new_record("c", image=b"x")])
    (tmp_path / "half.parquet").write_bytes((tmp_path / "half.parquet").read_bytes()[:-20])
    with pytest.raises(UserError, match=r"half\.parquet: not a readable"):
        read_shards(tmp_path)
    pq.write_table(pa.table({"sample_id": ["x"]}), tmp_path / "half.parquet")
    with pytest.raises(UserError, match=r"half\.parquet: .*lacks the column\(s\) .*caption"):
        read_shards(tmp_path)
