"""Operators that look at all rows, against `dj-process` on the same rows: the same ones stay, with the same stats."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.records import new_record, read_shards, write_shard
from ray_jobs import cli

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("ray_cluster")]  # workers and a dj-process
DJ_PROCESS = Path(sys.executable).parent / "dj-process"
RECIPES = {
    "near duplicates, then the longest of the most frequent sources": [
        {"words_num_filter": {"min_num": 5}},
        {"document_minhash_deduplicator": {"tokenization": "space", "window_size": 2, "jaccard_threshold": 0.6}},
        {"topk_specified_field_selector": {"field_key": "__dj__stats__.num_words", "topk": 24}},
        {"frequency_specified_field_selector": {"field_key": "source", "topk": 2}},
        {"text_length_filter": {"min_len": 30}},
    ],
    "a range of a field, tags, and a drawing": [
        {"tags_specified_field_selector": {"field_key": "source", "target_tags": ["a", "b"]}},
        {"range_specified_field_selector": {"field_key": "score", "lower_percentile": 0.1, "upper_percentile": 0.8}},
        {"alphanumeric_filter": {"min_ratio": 0.7}},
        {"random_selector": {"select_ratio": 0.5}},
    ],
}


def rows() -> list[dict[str, Any]]:
    """Captions of which every seventh is the one before it with a word more, and two fields."""
    rng, made = random.Random(1), list[dict[str, Any]]()
    words = ["red", "blue", "sign", "star", "above", "two", "label", "reads", "milk", "price"]
    for n in range(60):
        text = " ".join(rng.choice(words) for _ in range(4 + n % 17))
        text = f"{made[-1]['text']} extra" if n % 7 == 3 else text
        made.append({"text": text, "n": n, "score": rng.random(), "source": rng.choice("abc")})
    return made


def captions(folder: Path) -> Path:
    records: list[Any] = [
        new_record(
            row["text"], image=f"picture {row['n']}".encode(), meta={k: v for k, v in row.items() if k != "text"}
        )
        for row in rows()
    ]
    for part in (0, 1):
        write_shard(folder / "captions" / f"part-{part}.parquet", records[30 * part :][:30])
    return folder / "captions"


def recipe_file(folder: Path, process: list[dict[str, Any]], **others: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**others, "process": process}, sort_keys=False))
    return path


@pytest.mark.parametrize("process", RECIPES.values(), ids=RECIPES)
def test_the_same_rows_stay_as_with_data_juicer(process: list[dict[str, Any]], tmp_path: Path) -> None:
    data, export = tmp_path / "data.jsonl", tmp_path / "exported" / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows())) + "\n")
    settings = {"dataset_path": str(data), "export_path": str(export), "np": 1, "use_cache": False}
    recipe = recipe_file(tmp_path, process, **settings, keep_stats_in_res_ds=True)
    done = subprocess.run([DJ_PROCESS, "--config", recipe], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = {row["n"]: row["__dj__stats__"] for row in map(json.loads, export.read_text().splitlines())}
    words = ("--output", str(tmp_path / "refined"), "--refine.recipe", str(recipe), "--refine.text", "caption")
    assert cli.main(["refine", str(captions(tmp_path)), *words]) == 0
    table = read_shards(tmp_path / "refined")
    ours = {
        json.loads(meta)["n"]: json.loads(stats)
        for meta, stats in zip(table["meta"].to_pylist(), table["stats"].to_pylist(), strict=True)
    }
    assert ours == {n: pytest.approx(stats) for n, stats in theirs.items()} and 0 < len(ours) < 60
    rejected = read_shards(tmp_path / "refined" / "rejects")["reject_reason"].to_pylist()
    assert len(rejected) + len(ours) == 60 and all(rejected)


def test_what_such_an_operator_cannot_do_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A stat or a field that no row has, and a package that is not there, before anything is written."""
    data = captions(tmp_path)

    def refused(operator: dict[str, Any]) -> str:
        recipe = recipe_file(tmp_path, [{"words_num_filter": {"min_num": 1}}, operator])
        words = ("--output", str(tmp_path / "refined"), "--refine.recipe", str(recipe), "--refine.text", "caption")
        assert cli.main(["refine", str(data), *words, "--restart"]) == 2
        return capsys.readouterr().err

    missing = refused({"topk_specified_field_selector": {"field_key": "__dj__stats__.text_len", "topk": 3}})
    assert "no row has '__dj__stats__.text_len'; the stats of the operators before it are num_words" in missing
    field = refused({"frequency_specified_field_selector": {"field_key": "views", "topk": 3}})
    assert "field_key: no row has 'views'" in field
    simhash = refused({"document_simhash_deduplicator": {}})
    assert "document_simhash_deduplicator needs the package simhash-pybind" in simhash
