"""What changes while or after a dataset is captioned: rows come, go and turn bad; a model breaks; a disk fills."""

from __future__ import annotations

import json
import random
import re
import string
import subprocess
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.blip2.config import CandidateConfig, DecodingConfig
from pipelines.blip2.pixels import PixelSpec
from pipelines.caption import stage
from pipelines.caption.config import CaptionConfig
from pipelines.caption.estimate import describe, estimate
from pipelines.caption.guards import GuardConfig
from pipelines.caption.index import build_index, index_files
from pipelines.caption.replica import decode_batch
from pipelines.caption.results import Results, result_schema
from pipelines.caption.tally import Tally
from pipelines.errors import UserError, WorkFailed
from pipelines.formats import Reading, open_dataset
from pipelines.records import Record, iter_records, read_shards
from ray_jobs import cli

from ..tiny_blip2 import picture

SPEC = PixelSpec(32, 32, 3, 1 / 255, (0.5,) * 3, (0.5,) * 3)


def config(model: Path, **changes: object) -> CaptionConfig:
    defaults = {"model": str(model), "batch_size": 8, "max_new_tokens": 8}
    return CaptionConfig(**{**defaults, **changes})  # type: ignore[arg-type]


def photos(folder: Path, seeds: range) -> Path:
    folder.mkdir(exist_ok=True)
    for seed in seeds:
        (folder / f"{seed:03d}.jpg").write_bytes(picture(seed, (48, 40)))
    return folder


def by_name(output: Path) -> dict[str, Record]:
    return {Path(record["image_uri"] or "").name: record for record in iter_records(output)}


@pytest.mark.heavy
def test_a_dataset_that_grows_is_captioned_where_it_is_new(ray_cluster: None, blip2: Path, tmp_path: Path) -> None:
    """New rows are captioned and old ones kept as they are; vanished rows leave; a failed row gets another chance;
    another prompt is refused.
    """
    folder, output = photos(tmp_path / "photos", range(12)), tmp_path / "out"
    (folder / "late.jpg").write_bytes(b"half a download")
    sampled = config(
        blip2,
        decoding=DecodingConfig("sample"),
        candidates=CandidateConfig(count=3, choose="longest_clean"),
    )
    first = stage.run(str(folder), output, sampled)
    assert (first["captioned"], first["new_rows"], first["failed"]) == (12, 13, {"not an image": 1})
    before = by_name(output)
    assert all(len(record["candidates"]) == 3 for name, record in before.items() if name != "late.jpg")
    assert all("candidate_scores" in json.loads(r["stats"]) for n, r in before.items() if n != "late.jpg")

    photos(folder, range(12, 17))
    (folder / "000.jpg").unlink()
    (folder / "late.jpg").write_bytes(picture(98))
    claimed = json.loads((output / ".stage.json").read_text())["fingerprint"]
    second = stage.run(str(folder), output, sampled)
    after = by_name(output)
    assert (second["captioned"], second["resumed_rows"], second["new_rows"], second["vanished"]) == (17, 11, 6, 1)
    assert set(after) == {f"{seed:03d}.jpg" for seed in range(1, 17)} | {"late.jpg"}
    assert all(after[name] == before[name] for name in set(before) & set(after) - {"late.jpg"})
    assert after["late.jpg"]["error"] is None and after["late.jpg"]["recaption"]
    assert json.loads((output / ".stage.json").read_text())["fingerprint"] != claimed, (
        "later stages must see the change"
    )
    alone = stage.run(str(folder), tmp_path / "alone", sampled)
    assert alone["metrics"] == second["metrics"] and by_name(tmp_path / "alone") == after
    with pytest.raises(UserError, match=r"what changed: prompt\)"):
        stage.run(str(photos(folder, range(20, 21))), output, replace(sampled, prompt="a red"))


def test_a_kill_while_taking_over_loses_nothing(blip2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it breaks off between finding a grown dataset and starting on it, the finished captions are still there
    the next time.
    """
    folder, output = photos(tmp_path / "photos", range(3)), tmp_path / "out"

    def captions(index: Path, results: Results, *_: object) -> None:
        """Stands for the pass: a caption for every row without one."""
        done = set(ids_of(results))
        rows = [r for file in sorted(index.glob("*.parquet")) for r in pq.read_table(file).to_pylist()]
        new = [r["sample_id"] for r in rows if r["sample_id"] not in done and not r["skip"]]
        captioned.append(len(new))
        results.make_directories()
        values = {
            "sample_id": new,
            "candidates": [["c"]] * len(new),
            "scores": [None] * len(new),
            "recaption": ["c"] * len(new),
            "error": [None] * len(new),
        }
        table = _table(values)
        pq.write_table(table, results.shards / f"n_{len(captioned):06d}.parquet")
        pq.write_table(table.select(["sample_id"]), results.checkpoint / f"n_{len(captioned):06d}.parquet")

    captioned: list[int] = []
    monkeypatch.setattr(stage, "caption_index", captions)
    stage.run(str(folder), output, config(blip2))
    photos(folder, range(3, 5))

    class Killed(BaseException):
        pass

    def killed(*_: object, **__: object) -> None:
        raise Killed

    for place, name in (
        (Results, "carry_over"),
        (stage.StageOutput, "accept"),
        (stage, "build_index"),
        (stage, "write_records"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(place, name, killed)
            with pytest.raises(Killed):
                stage.run(str(folder), output, config(blip2))
    assert stage.run(str(folder), output, config(blip2))["rows_out"] == 5
    assert [count for count in captioned if count] == [3, 2]


def ids_of(results: Results) -> list[str]:
    return [found for table in results.tables(["sample_id"]) for found in table["sample_id"].to_pylist()]


def _table(values: dict[str, list[object]]) -> pa.Table:

    return pa.table(values, schema=result_schema())


def test_files_that_change_or_vanish_during_the_run(tmp_path: Path) -> None:
    """The key stands for the content: a file that is another one by now, or gone, is a row with its error, never a
    caption under a wrong key.
    """
    folder = photos(tmp_path / "photos", range(4))
    build_index(open_dataset(folder), tmp_path / "index")
    (folder / "001.jpg").write_bytes(picture(77))
    (folder / "002.jpg").unlink()
    rows = decode_batch(pq.read_table(index_files(tmp_path / "index")[0]), SPEC).to_pylist()
    assert [(row["error"] or "ok")[:12] for row in rows] == ["ok", "changed file", "missing file", "ok"]
    assert [row["pixels"] is None for row in rows] == [False, True, True, False]


def test_own_prompts_come_from_meta(tmp_path: Path) -> None:
    """`prompt_key` picks a sample's prompt; where there is none the recipe's stands, and what is no text is a row with
    its error.
    """
    photos(tmp_path, range(3))
    described = [{"file_name": "000.jpg", "ask": "a red"}, {"file_name": "001.jpg"}, {"file_name": "002.jpg", "ask": 5}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, described)))
    build_index(open_dataset(tmp_path), tmp_path / "index")
    rows = decode_batch(pq.read_table(index_files(tmp_path / "index")[0]), SPEC, "ask").to_pylist()
    assert [row["prompt"] for row in rows] == ["a red", None, None]
    assert rows[2]["error"] == "bad row: its prompt 'ask' is a int, not a text (002.jpg)"


@pytest.mark.heavy
def test_guards_stop_the_run_and_the_same_command_continues(ray_cluster: None, blip2: Path, tmp_path: Path) -> None:
    """Too many failures end the run with their kind and an example; put right, it continues, and what had failed is
    tried again.
    """
    folder, output = photos(tmp_path / "photos", range(160)), tmp_path / "out"
    for seed in range(0, 160, 2):
        (folder / f"{seed:03d}.jpg").write_bytes(f"<html>{seed}".encode())
    guarded = config(blip2, guards=GuardConfig(max_error_share=0.3, max_repetition=1, min_rows=64, window=100))
    with pytest.raises(
        WorkFailed, match=r"% of the last \d+ rows failed, most by 'not an image'.*max_error_share is 0.3"
    ):
        stage.run(str(folder), output, guarded)
    assert not (output / "MANIFEST.json").exists()
    lenient = config(blip2, guards=GuardConfig(max_error_share=0.6, max_repetition=1, min_rows=64, window=100))
    manifest = stage.run(str(folder), output, lenient)
    assert (manifest["captioned"], manifest["failed"]) == (80, {"not an image": 80})
    assert (output / "contact_sheet.html").read_text().count("<figure>") == 24


def test_failed_rows_are_forgotten_in_checkpoint_and_data(tmp_path: Path) -> None:
    results = Results(tmp_path, "f")
    results.make_directories()
    table = _table(
        {
            "sample_id": ["a", "b"],
            "candidates": [["x"], []],
            "scores": [None, None],
            "recaption": ["x", None],
            "error": [None, "bad"],
        }
    )
    pq.write_table(table, results.shards / "s_0-0.parquet")
    pq.write_table(table.select(["sample_id"]), results.checkpoint / "s_0.parquet")
    results.forget_failed()
    assert pq.read_table(results.checkpoint / "s_0.parquet")["sample_id"].to_pylist() == ["a"]
    assert ids_of(results) == ["a"]


def test_a_dataset_in_the_wrong_place_is_refused_before_a_model_loads(blip2: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"text": "c", "images": [f"gone/{n}.jpg"]}) for n in range(600)]
    (tmp_path / "set.jsonl").write_text("\n".join(lines))
    with pytest.raises(WorkFailed, match="100 % of the last 600 rows failed, most by 'missing file'.*gone/0.jpg"):
        stage.run(str(tmp_path / "set.jsonl"), tmp_path / "out", config(blip2))


def test_tally_judges_the_window(ray_cluster: None) -> None:
    """A model that breaks late is caught by what it says then, and no judgement falls on a few rows."""
    tally = Tally(1000, GuardConfig(max_repetition=0.6, max_error_share=0.5, min_rows=50, window=100))
    assert tally.add(["a red sign left of a house"] * 300, [], []) == ""
    live = tally.live()
    assert (live.rows, live.repetition, live.error_share, live.mean_words) == (300, 0, 0, 7)
    assert live.lexical_diversity == pytest.approx(6 / 700)
    assert "max_repetition is 0.6; e.g. 'the the the the'" in tally.add(["the the the the"] * 80, [], [])
    live = tally.live()
    assert (live.repetition, live.mean_words) == pytest.approx((0.8, 0.8 * 4 + 0.2 * 7)), (
        "what left the window counts no longer"
    )
    assert live.lexical_diversity == pytest.approx(7 / (80 * 4 + 20 * 7))
    few = Tally(1000, GuardConfig(min_rows=50, window=100))
    assert few.add([], [("missing file", "missing file: x")] * 49, []) == ""
    assert "most by 'missing file'" in few.add([], [("missing file", "missing file: x")], [])


def test_a_full_disk_names_the_output(blip2: Path, tmp_path: Path) -> None:
    """A real file system that is too small for the index: what to do is said, and where."""
    folder, small = photos(tmp_path / "photos", range(20)), tmp_path / "small"
    small.mkdir()
    for file in folder.glob("*.jpg"):
        file.with_suffix(".txt").write_text("".join(random.Random(file.name).choices(string.printable, k=30_000)))
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "captune", str(small)], capture_output=True)
    if mount.returncode:
        pytest.skip("no right to mount a small file system here")
    try:
        with pytest.raises(
            WorkFailed, match=r"small/out.*: No space left.*the volume .*small holds 0.2 MB.*the same command continues"
        ):
            stage.run(str(folder), small / "out", config(blip2))
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_dry_run_measures_and_writes_nothing(blip2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows, bytes and failures are the input's, times are measured, and twice the actors take half the hours."""
    folder = photos(tmp_path / "photos", range(20))
    (folder / "bad.jpg").write_bytes(b"nothing")
    found = estimate(str(folder), config(blip2, actors=3))
    size = sum(file.stat().st_size for file in folder.glob("0*.jpg"))
    assert (found["rows"], found["rows_exact"]) == (21, True) and found["bytes"] == pytest.approx(
        size * 21 / 20, rel=0.01
    )
    assert found["sample"]["failed"] == pytest.approx(1 / 21, abs=1e-4) and found["sample"]["caption_ms"] > 0
    by_actors = {row["actors"]: row for row in found["actors"]}
    assert {1, 2, 3, 4, 8} <= set(by_actors) and by_actors[2]["hours"] == pytest.approx(
        by_actors[1]["hours"] / 2, abs=1e-4
    )
    assert "21 rows" in describe(found) and found["memory_per_actor"] > 1 << 20
    assert cli.main(["caption", "--dry-run", "--json", "--input", str(folder), "--caption.model", str(blip2)]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 21
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_shards_of_another_kind_stop_the_run_by_name(blip2: Path, tmp_path: Path) -> None:
    """One Parquet shard without an image column, one cut short: the file is named before any model loads."""
    (tmp_path / "tables").mkdir()
    pq.write_table(pa.table({"image": [picture(1)], "text": ["t"]}), tmp_path / "tables" / "0.parquet")
    pq.write_table(pa.table({"other": [1]}), tmp_path / "tables" / "1.parquet")
    with pytest.raises(UserError, match="1.parquet: no image column"):
        stage.run(str(tmp_path / "tables"), tmp_path / "out", config(blip2))
    whole = (tmp_path / "tables" / "0.parquet").read_bytes()
    (tmp_path / "tables" / "1.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="1.parquet: not a readable Parquet"):
        stage.run(str(tmp_path / "tables"), tmp_path / "out2", config(blip2))
    named = config(blip2, reading=Reading(columns={"image": "photo"}))
    with pytest.raises(UserError, match="0.parquet: no column 'photo'; it has image, text"):
        stage.run(str(tmp_path / "tables"), tmp_path / "out3", named)
    with pytest.raises(UserError, match="0.parquet: no column 'photo'; it has image, text"):
        estimate(str(tmp_path / "tables"), named)


def test_ten_percent_corrupt_are_accounted_for(ray_cluster: None, blip2: Path, tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", range(100))
    for seed in range(0, 100, 10):
        data = picture(seed, (48, 40))
        (folder / f"{seed:03d}.jpg").write_bytes(data[: len(data) // 2])
    manifest = stage.run(str(folder), tmp_path / "out", config(blip2))
    table = read_shards(tmp_path / "out")
    kinds = Counter((error or "captioned").split(":")[0] for error in table["error"].to_pylist())
    assert kinds == {"captioned": manifest["captioned"], "broken image": manifest["failed"]["broken image"]}
    assert manifest["captioned"] == 90 and manifest["rows_out"] == 100


@pytest.mark.heavy
def test_metrics_are_exported_under_the_names_that_dashboards_use(ray_cluster: None) -> None:
    """What Prometheus scrapes from the node, as `pipelines/caption/tally.py` lists it."""
    import ray

    node = ray.nodes()[0]
    page = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    tally = ray.remote(num_cpus=0)(Tally).remote(1000, GuardConfig())
    ray.get(tally.add.remote(["a red sign"] * 9, [("missing file", "missing file: x")], []))
    wanted = {
        "ray_captune_caption_images_total": 10,
        "ray_captune_caption_failed_total": 1,
        "ray_captune_caption_images_per_second": None,
        "ray_captune_caption_error_share": pytest.approx(0.1),
        "ray_captune_caption_mean_words": 3,
        "ray_captune_caption_lexical_diversity": pytest.approx(3 / 27),
        "ray_captune_caption_repetition": 0,
        "ray_captune_caption_remaining_images": 990,
    }
    found: dict[str, list[float]] = {}  # earlier runs on this cluster have series of their own
    until = time.monotonic() + 60
    while time.monotonic() < until and 990 not in found.get("ray_captune_caption_remaining_images", []):
        time.sleep(1)
        lines = [line for line in httpx.get(page).text.splitlines() if line.startswith("ray_captune_caption")]
        found = {}
        for line in lines:
            found.setdefault(re.split(r"[{ ]", line)[0], []).append(float(line.rpartition(" ")[2]))
    assert set(wanted) == set(found)
    assert [name for name, value in wanted.items() if value is not None and value not in found[name]] == []
    assert max(found["ray_captune_caption_images_per_second"]) > 0
    assert any('kind="missing file"' in line for line in lines)
