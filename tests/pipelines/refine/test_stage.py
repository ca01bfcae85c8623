"""The refine stage on a small Ray cluster: nothing vanishes, every reject says why, two runs give the same tables."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.errors import UserError, WorkFailed
from pipelines.records import SAME_PICTURE, Record, new_record, read_shards, repeat_id, write_shard
from pipelines.refine import stage
from pipelines.refine.config import RefineConfig
from pipelines.refine.metrics import stats

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("ray_cluster")]  # workers that import Data-Juicer
SAMPLE = Path(__file__).parents[3] / "pipelines" / "recipes" / "refine_captions.yaml"


def picture(width: int, height: int, seed: int) -> bytes:
    image = Image.frombytes(
        "L", (width, height), bytes((i * (seed + 7) * 2654435761 >> 8) % 256 for i in range(width * height))
    )
    stream = io.BytesIO()
    image.convert("RGB").save(stream, "JPEG")
    return stream.getvalue()


def records(folder: Path) -> list[Record]:
    """Twelve samples: six good ones (images as bytes and as files), and one of every way to be rejected."""
    rows: list[Any] = []
    for seed in range(6):
        data = picture(96 + seed, 80, seed)
        uri = folder / f"{seed}.jpg"
        uri.write_bytes(data)
        held = {"image": data} if seed % 2 else {"image_uri": str(uri), "content": data}
        rows.append(new_record("image", **held) | {"recaption": f"a red sign that says word{seed} above two stars"})
    good = rows[0]["recaption"]
    rows.append(new_record("photo", image=picture(90, 90, 7)) | {"recaption": "a sign a sign a sign a sign"})
    rows.append(new_record("photo", image=picture(40, 90, 8)) | {"recaption": good})
    rows.append(new_record("photo", image=picture(90, 90, 9)) | {"recaption": "  "})
    rows.append(new_record("", image_uri=str(folder / "gone.jpg"), error=f"missing file: {folder}/gone.jpg"))
    again = dict(rows[1])
    rows.append(again)  # the same row twice, in another shard
    rows.append({**rows[0], "sample_id": repeat_id(rows[0]["sample_id"], 2)})
    return rows


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    rows = records(tmp_path)
    write_shard(tmp_path / "captions" / "part-0.parquet", rows[:5])
    write_shard(tmp_path / "captions" / "part-1.parquet", rows[5:])
    return tmp_path / "captions"


def enhanced() -> RefineConfig:
    return RefineConfig(text="recaption", recipe=str(SAMPLE), batch_size=4)


def test_every_row_is_kept_or_rejected_with_its_reason(captions: Path, tmp_path: Path) -> None:
    manifest = stage.run(captions, tmp_path / "out", enhanced(), arm="enhanced")
    kept, rejects = read_shards(tmp_path / "out"), read_shards(tmp_path / "out" / "rejects")
    assert (
        (manifest["rows_in"], manifest["kept"], manifest["rejected"])
        == (12, kept.num_rows, rejects.num_rows)
        == (12, 6, 6)
    )
    assert manifest["text"] == manifest["inputs"]["text"] == "recaption"
    assert sorted(rejects["reject_reason"].to_pylist()) == [
        "duplicate",
        "duplicate",
        "empty_text",
        f"error: missing file: {tmp_path}/gone.jpg",
        "image_shape_filter: image_width=40, image_height=90",
        "word_repetition_filter: word_rep_ratio=1",
    ]
    assert kept["keep"].to_pylist() == [True] * 6 and rejects["keep"].to_pylist() == [False] * 6
    assert kept["reject_reason"].null_count == 6
    for text, row in zip(kept["recaption"].to_pylist(), kept["stats"].to_pylist(), strict=True):
        found = json.loads(row)
        assert found["text_len"] == len(text) and found["image_height"] == [80] and found["num_words"] == 9
    before = {row["sample_id"]: row for row in read_shards(captions).to_pylist()}
    for row in kept.to_pylist():  # nothing but the verdict was touched
        assert {k: row[k] for k in ("image", "image_uri", "caption", "recaption", "meta")} == {
            k: before[row["sample_id"]][k] for k in ("image", "image_uri", "caption", "recaption", "meta")
        }


def test_metrics_hold_funnel_reasons_and_quality_before_and_after(captions: Path, tmp_path: Path) -> None:
    stage.run(captions, tmp_path / "out", enhanced(), arm="enhanced")
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (found["rows_in"], found["kept"], found["retention"]) == (12, 6, 0.5)
    assert found["funnel"][0] == {"step": "error", "rows_in": 12, "rows_out": 11, "rejected": 1}
    assert found["funnel"][-1]["rows_out"] == 6
    assert [a["rows_out"] for a in found["funnel"][:-1]] == [b["rows_in"] for b in found["funnel"][1:]]
    assert [step["step"] for step in found["funnel"][3:]] == [next(iter(e)) for e in stage.read_recipe(SAMPLE)]
    assert found["reject_reasons"] == {
        "duplicate": 2,
        "empty_text": 1,
        "error: missing file": 1,
        "image_shape_filter": 1,
        "word_repetition_filter": 1,
    }
    assert (found["before"]["rows"], found["before"]["texts"], found["before"]["unique_words"]) == (12, 11, 2)
    assert found["after"]["rows"] == 6 and found["after"]["mean_words"] == 9
    assert found["before"] == stats(captions)["columns"]["caption"]
    assert found["after"] == stats(tmp_path / "out")["columns"]["recaption"]


def test_every_row_failed_is_a_failure(tmp_path: Path) -> None:
    """Pictures that went away since captioning; rows that the recipe judged and let go are none."""
    rows: list[Any] = [new_record(f"photo {n}", image_uri=f"/gone/{n}.jpg", content=b"%d" % n) for n in range(3)]
    write_shard(tmp_path / "captions" / "part-0.parquet", rows)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("process:\n  - image_shape_filter: {min_width: 64}\n")
    with pytest.raises(WorkFailed, match="every row failed: 3 error: missing file; e.g. error: missing file: /gone/"):
        stage.run(tmp_path / "captions", tmp_path / "out", RefineConfig(text="caption", recipe=str(recipe)))
    assert not (tmp_path / "out" / "MANIFEST.json").exists()
    recipe.write_text("process:\n  - text_length_filter: {min_len: 500}\n")
    manifest = stage.run(tmp_path / "captions", tmp_path / "b", RefineConfig(text="caption", recipe=str(recipe)))
    assert (manifest["kept"], manifest["rejected"]) == (0, 3)


def test_without_a_recipe_every_usable_row_keeps_its_own_caption(captions: Path, tmp_path: Path) -> None:
    """The `original` arm: rows with an error, without a text and duplicates go, whatever their captions are like."""
    manifest = stage.run(captions, tmp_path / "out", RefineConfig(text="caption"), arm="original")
    assert (manifest["kept"], manifest["rejected"], manifest["text"]) == (9, 3, "caption")
    assert set(read_shards(tmp_path / "out")["caption"].to_pylist()) == {"image", "photo"}


def test_two_runs_and_two_shard_layouts_give_the_same_tables(captions: Path, tmp_path: Path) -> None:
    rows = read_shards(captions).to_pylist()
    write_shard(tmp_path / "other" / "one.parquet", rows[::-1])
    stage.run(captions, tmp_path / "a", enhanced())
    stage.run(captions, tmp_path / "b", RefineConfig(recipe=str(SAMPLE), batch_size=256, cpus_per_task=0.5))
    stage.run(tmp_path / "other", tmp_path / "c", enhanced())
    for name in ("", "rejects"):
        first = read_shards(tmp_path / "a" / name)
        assert first.equals(read_shards(tmp_path / "b" / name))
        assert first.equals(read_shards(tmp_path / "c" / name))
        for path in (tmp_path / "a" / name).glob("*.parquet"):
            assert path.read_bytes() == (tmp_path / "b" / name / path.name).read_bytes()


def test_done_is_done_and_half_done_is_done_again(captions: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = stage.run(captions, output, enhanced())
    expected = read_shards(output)
    written = (output / "part-0.parquet").stat().st_mtime_ns
    assert stage.run(captions, output, enhanced()) == first
    assert (output / "part-0.parquet").stat().st_mtime_ns == written
    (output / "MANIFEST.json").unlink()  # as if killed: a whole shard of ours, one of nobody's, half a file
    write_shard(output / "part-9.parquet", records(tmp_path)[:1])
    (output / "part-1.parquet.part").write_bytes(b"half")
    stage.run(captions, output, enhanced())
    assert read_shards(output).equals(expected)
    assert not list(output.glob("*.part"))


def test_another_recipe_in_the_same_directory_is_refused_unless_restarted(captions: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("process:\n  - text_length_filter: {min_len: 500}\n")
    stage.run(captions, tmp_path / "out", enhanced())
    with pytest.raises(UserError, match="another run.*process"):
        stage.run(captions, tmp_path / "out", RefineConfig(recipe=str(other)))
    manifest = stage.run(captions, tmp_path / "out", RefineConfig(recipe=str(other)), restart=True)
    assert (manifest["kept"], manifest["rejected"]) == (0, 12)


def test_a_recipe_that_cannot_run_leaves_the_output_unclaimed(captions: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("process:\n  - text_lenght_filter: {}\n")
    with pytest.raises(UserError, match="did you mean text_length_filter"):
        stage.run(captions, tmp_path / "out", RefineConfig(recipe=str(bad)))
    assert not (tmp_path / "out").exists()


def test_a_package_missing_only_at_run_time_reaches_the_user_out_of_the_worker(captions: Path, tmp_path: Path) -> None:
    """fix_unicode_mapper is built without ftfy and misses it on the first row, inside a Ray task."""
    if importlib.util.find_spec("ftfy"):
        pytest.skip("ftfy is installed here")
    recipe = tmp_path / "ftfy.yaml"
    recipe.write_text("process:\n  - fix_unicode_mapper: {}\n")
    with pytest.raises(UserError, match="fix_unicode_mapper needs the package ftfy"):
        stage.run(captions, tmp_path / "out", RefineConfig(recipe=str(recipe)))


def test_mappers_and_the_global_deduplicator_work_in_recipe_order(captions: Path, tmp_path: Path) -> None:
    """A mapper makes the six good texts equal; the deduplicator then keeps the first id; the filter after it sees one
    row.
    """
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "process:\n"
        "  - words_num_filter: {min_num: 9}\n"
        "  - replace_content_mapper: {pattern: 'word[0-9]', repl: 'cafe'}\n"
        "  - document_deduplicator: {lowercase: true}\n"
        "  - text_length_filter: {min_len: 10}\n"
    )
    stage.run(captions, tmp_path / "out", RefineConfig(recipe=str(recipe)))
    kept = read_shards(tmp_path / "out").to_pylist()
    assert [row["recaption"] for row in kept] == ["a red sign that says cafe above two stars"]
    reasons = read_shards(tmp_path / "out" / "rejects")["reject_reason"].to_pylist()
    assert reasons.count(f"document_deduplicator: duplicate_of={kept[0]['sample_id']}") == 6
    assert "text_len" in json.loads(kept[0]["stats"])


def test_the_first_of_equal_rows_stays(tmp_path: Path) -> None:
    """One picture with one new text is one row to train on, however many captions it had; `document_deduplicator` keeps
    the dataset's first row, as Data-Juicer does. A column of somebody's own called duplicate_of means nothing.
    """
    rows: list[Any] = [new_record(f"c{n}", image=picture(90, 80, n // 3), meta={"n": n}) for n in range(6)]
    for n, row in enumerate(rows):
        row["recaption"] = "one text" if n < 3 else f"text {n}"
        own = {"n": n, "duplicate_of": "mine"}
        row["meta"] = json.dumps({**own, SAME_PICTURE: rows[n // 3 * 3]["sample_id"]} if n % 3 else own)
    write_shard(tmp_path / "captions" / "part-0.parquet", rows)
    stage.run(tmp_path / "captions", tmp_path / "out", RefineConfig())
    assert sorted(json.loads(meta)["n"] for meta in read_shards(tmp_path / "out")["meta"].to_pylist()) == [0, 3, 4, 5]
    assert read_shards(tmp_path / "out" / "rejects")["reject_reason"].to_pylist() == ["duplicate"] * 2
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "process:\n  - replace_content_mapper: {pattern: '[0-9]', repl: ''}\n  - document_deduplicator: {}\n"
    )
    stage.run(tmp_path / "captions", tmp_path / "b", RefineConfig(recipe=str(recipe)))
    assert sorted(json.loads(meta)["n"] for meta in read_shards(tmp_path / "b")["meta"].to_pylist()) == [0, 3]


def test_a_broken_shard_is_named(captions: Path, tmp_path: Path) -> None:
    (captions / "part-1.parquet").write_bytes((captions / "part-1.parquet").read_bytes()[:200])
    with pytest.raises(UserError, match="part-1.parquet: not a readable Parquet shard"):
        stage.run(captions, tmp_path / "out", enhanced())
    assert not (tmp_path / "out").exists()  # so that the same command works once the shard is repaired


def test_what_is_no_record_directory_is_refused(captions: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no Parquet shards"):
        stage.run(tmp_path / "empty", tmp_path / "out", enhanced())
    (tmp_path / "foreign").mkdir()
    pq.write_table(pa.table({"url": ["x"], "text": ["y"]}), tmp_path / "foreign" / "a.parquet")
    with pytest.raises(UserError, match="a.parquet"):
        stage.run(tmp_path / "foreign", tmp_path / "out", enhanced())
    assert not (tmp_path / "out").exists()
    (captions / ".stage.json").write_text(json.dumps({"stage": "caption", "fingerprint": "f", "inputs": {}}))
    with pytest.raises(UserError, match="has not finished"):
        stage.run(captions, tmp_path / "out", enhanced())
    assert not (tmp_path / "out").exists()
