"""What a kill can leave behind never reaches the records: half-written files, doubled results, rows without a
result.
"""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.caption import stage
from pipelines.caption.config import CaptionConfig
from pipelines.caption.estimate import estimate
from pipelines.caption.finish import write_records
from pipelines.caption.guards import GuardConfig
from pipelines.caption.index import build_index, index_files
from pipelines.caption.results import Results, Work, count_work, result_schema
from pipelines.caption.tally import Tally
from pipelines.errors import UserError, WorkFailed
from pipelines.formats import open_dataset
from pipelines.records import SAME_PICTURE, iter_records, repeat_id
from pipelines.refine.metrics import stats

from ..tiny_blip2 import picture


def commit(
    results: Results, name: str, rows: list[tuple[str, str | None, str | None]], *, pending: bool = False
) -> None:
    """A data file and its checkpoint as Ray Data leaves them."""
    results.make_directories()
    ids, texts, errors = (list(column) for column in zip(*rows, strict=True))
    values = {"sample_id": ids, "recaption": texts, "error": errors}
    values["candidates"] = [[] if text is None else [text, "another"] for text in texts]
    values["scores"] = [None if text is None else [0.5, 0.25] for text in texts]
    table = pa.table(values, schema=result_schema())
    pq.write_table(table, results.shards / f"{name}.parquet")
    pq.write_table(table.select(["sample_id"]), results.checkpoint / f"{name}{'.pending' if pending else ''}.parquet")


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """An index of 150 pictures, one of them twice and one missing."""
    (tmp_path / "i").mkdir()
    lines = []
    for seed in range(150):
        (tmp_path / "i" / f"{seed}.jpg").write_bytes(picture(seed, (16, 16)))
        lines.append({"text": f"c{seed}", "images": [f"i/{seed}.jpg"]})
    lines.insert(70, lines[3])
    (tmp_path / "i" / "9.jpg").unlink()
    (tmp_path / "set.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    build_index(open_dataset(tmp_path / "set.jsonl"), tmp_path / "_work" / "index")
    return tmp_path / "_work"


def test_index_is_small_files_in_order(work: Path) -> None:
    """One index file is one unit of work; the missing picture and the duplicate are not work."""
    tables = [pq.read_table(file) for file in index_files(work / "index")]
    assert [len(table) for table in tables] == [32, 32, 32, 32, 23]
    rows = [row for table in tables for row in table.to_pylist()]
    assert [row["caption"] for row in rows] == [f"c{i}" for i in range(70)] + ["c3"] + [f"c{i}" for i in range(70, 150)]
    assert count_work(work / "index", Results(work, "f")) == Work(149, 0)
    assert sum(not row["skip"] for row in rows) == 149
    assert rows[70]["sample_id"] == rows[3]["sample_id"] + "-2" and rows[70]["result_of"] == rows[3]["sample_id"]
    assert rows[9]["error"].startswith("missing file") and "set.jsonl:10)" in rows[9]["error"]


def test_a_picture_with_several_captions_is_captioned_once(tmp_path: Path) -> None:
    """Rows that share a picture share its new caption, unless their own prompts differ; which one it is stands in their
    meta, whatever columns somebody has.
    """
    (tmp_path / "1.jpg").write_bytes(picture(1, (16, 16)))
    lines: list[dict[str, object]] = [{"text": f"c{n}", "images": ["1.jpg"], "duplicate_of": n} for n in range(3)]
    lines += [{**lines[1]}, {"text": "c4", "images": ["1.jpg"], "ask": "What is it?"}]
    (tmp_path / "set.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    for prompt_key, works in (("", 1), ("ask", 2)):
        index = tmp_path / f"index{prompt_key}"
        build_index(open_dataset(tmp_path / "set.jsonl"), index, prompt_key)
        rows = [row for file in index_files(index) for row in pq.read_table(file).to_pylist()]
        first = rows[0]["sample_id"]
        assert count_work(index, Results(tmp_path, "f")) == Work(works, 0)
        assert [row["result_of"] for row in rows[:4]] == [first] * 4
        assert rows[3]["sample_id"] == repeat_id(rows[1]["sample_id"], 2)
        meta = [json.loads(row["meta"]) for row in rows]
        assert [found.get("duplicate_of") for found in meta] == [0, 1, 2, 1, None]
        assert [found.get(SAME_PICTURE) for found in meta[:4]] == [None, first, first, first]
        assert (meta[4].get(SAME_PICTURE) == first) == (works == 1)


def test_doubles_and_half_files_do_not_count(ray_cluster: None, work: Path, tmp_path: Path) -> None:
    """An id written twice appears once; a file whose checkpoint is pending is not even opened; duplicates share their
    text.
    """
    rows = [r for file in index_files(work / "index") for r in pq.read_table(file).to_pylist() if not r["skip"]]
    results = Results(work, "f")
    done = [(r["sample_id"], f"about {r['caption']}", None) for r in rows[:-1]]
    commit(results, "a_000000", done[:100])
    commit(results, "b_000001", done[90:])
    commit(results, "c_000002", [(rows[-1]["sample_id"], "half", None)], pending=True)
    (results.shards / "c_000002.parquet").write_bytes(b"PAR1 half a file")
    assert count_work(work / "index", results) == Work(149, 148)
    (tmp_path / "out").mkdir()
    with pytest.raises(WorkFailed, match=r"1 rows never came back.*set\.jsonl:151"):
        write_records(work / "index", results.tables(), tmp_path / "out", 60)
    commit(results, "d_000003", [(rows[-1]["sample_id"], None, "broken image: x (set.jsonl:151)")])

    facts = write_records(work / "index", results.tables(), tmp_path / "out", 60)
    assert (facts["rows_in"], facts["rows_out"], facts["captioned"], facts["duplicates"]) == (151, 151, 148, 1)
    assert facts["failed"] == {"broken image": 1, "missing file": 1}
    assert facts["metrics"]["recaption"]["mean_words"] == 2
    assert [pq.read_metadata(p).num_rows for p in sorted((tmp_path / "out").glob("*.parquet"))] == [60, 60, 31]
    records = list(iter_records(tmp_path / "out"))
    assert len({r["sample_id"] for r in records}) == 151
    good = [r for r in records if r["error"] is None]
    assert all(r["recaption"] == f"about {r['caption']}" for r in good)
    assert all(r["candidates"] == [r["recaption"], "another"] for r in good)
    assert all(json.loads(r["stats"]) == {"candidate_scores": [0.5, 0.25]} for r in good)
    assert all(r["candidates"] == [] and r["stats"] == "{}" for r in records if r["error"] is not None)


def test_one_text_has_one_measure(ray_cluster: None, work: Path, tmp_path: Path) -> None:
    """What was live on the terminal stands in the manifest and is what `captune stats` counts, in every script."""
    said = ["A red sign, a red sign!", "“Cafe” for $5", "红色标志红色标志", "", "ป้ายหยุด sign"]
    rows = [r for file in index_files(work / "index") for r in pq.read_table(file).to_pylist()]
    wanted = [r for r in rows if not r["skip"]]
    done = [(r["sample_id"], said[n % len(said)], None) for n, r in enumerate(wanted[2:])]
    failed = [(r["sample_id"], None, "broken image: x") for r in wanted[:2]]
    results = Results(work, "f")
    commit(results, "a_000000", [*done, *failed])
    facts = write_records(work / "index", results.tables(), tmp_path / "out", 60)
    found = stats(tmp_path / "out")
    for column in ("caption", "recaption"):
        in_manifest = facts["metrics"][column]
        assert in_manifest == {key: found["columns"][column][key] for key in in_manifest}
    assert (found["rows"], found["texts"]) == (151, 148) and found["word_rep_ratio"] > 0.2

    tally = Tally(len(wanted), GuardConfig(max_repetition=1, window=1000))
    again = next(r["recaption"] for r in iter_records(tmp_path / "out") if r["sample_id"].endswith("-2"))
    tally.add([*(text for _, text, _ in done), again], [("broken image", "broken image: x")] * 2, [])
    live = tally.live()
    assert (live.mean_words, live.lexical_diversity, live.repetition) == pytest.approx(
        (found["mean_words"], found["lexical_diversity"], found["word_rep_ratio"]), abs=1e-6
    )


def test_no_caption_at_all_is_a_failure(work: Path, tmp_path: Path) -> None:
    """However few rows there are: pictures that no decoder reads show in the second pass only."""
    rows = [r for file in index_files(work / "index") for r in pq.read_table(file).to_pylist() if not r["skip"]]
    results = Results(work, "f")
    commit(results, "a_000000", [(r["sample_id"], None, f"broken image: x ({r['where']})") for r in rows])
    with pytest.raises(WorkFailed, match=r"not one row could be used: 150 broken image, 1 missing file; e.g. broken"):
        write_records(work / "index", results.tables(), tmp_path / "out", 60)


def test_a_dataset_of_faults_is_a_failure_before_any_model_loads(blip2: Path, tmp_path: Path) -> None:
    """Two rows are enough to say so, and `--dry-run` says it too; an empty table is refused."""
    faults = tmp_path / "set.jsonl"
    faults.write_text('{"text": "a", "images": ["no.jpg"]}\n{"text": "b", "images": ["http://x/y.jpg"]}\n')
    config = CaptionConfig(model=str(blip2))
    with pytest.raises(WorkFailed, match=r"not one row .*1 missing file, 1 remote image; e.g. .*set.jsonl:1"):
        stage.run(str(faults), tmp_path / "out", config)
    assert not (tmp_path / "out" / "MANIFEST.json").exists()
    with pytest.raises(WorkFailed, match=r"sample of 2 rows: not one row could be used"):
        estimate(str(faults), config)
    pq.write_table(
        pa.table({"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())}), tmp_path / "e.parquet"
    )
    for refused in (
        lambda: stage.run(str(tmp_path / "e.parquet"), tmp_path / "none", config),
        lambda: estimate(str(tmp_path / "e.parquet"), config),
    ):
        with pytest.raises(UserError, match="no rows"):
            refused()
