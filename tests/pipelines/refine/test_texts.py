"""Several texts of one sample: rows of their own, one chosen, or fewer rows; on a small Ray cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import UserError
from pipelines.manifest import open_stage
from pipelines.records import new_record, read_shards, source_id, write_shard
from pipelines.refine import stage
from pipelines.refine.config import MixConfig, RefineConfig, SubsetConfig
from pipelines.same import rows_digest

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("ray_cluster")]
FOUND = [f"photo {'very ' * n}old" for n in range(6)]


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    """Six samples; the captions as found grow longer, the new ones all have four words, and candidates are three."""
    rows: list[Any] = []
    for number, text in enumerate(FOUND):
        new = [f"sign {number} says {word}" for word in ("open", "shut", "sale")]
        record = new_record(text, image=b"%d" % number) | {"recaption": new[0], "candidates": new}
        rows.append(record)
    write_shard(tmp_path / "captions" / "part-0.parquet", rows[:2])
    write_shard(tmp_path / "captions" / "part-1.parquet", [*rows[2:], rows[0]])  # one again
    return tmp_path / "captions"


def rows(output: Path) -> list[tuple[str, str]]:
    return [(row["caption"], row["recaption"]) for row in read_shards(output).to_pylist()]


def test_all_candidates_and_the_original_make_rows(captions: Path, tmp_path: Path) -> None:
    """As Data-Juicer's image_captioning_mapper does with keep_candidate_mode all and keep_original_sample."""
    how = {"choose": "all", "keep_original": True}
    made = open_stage(tmp_path / "made", "caption", {"candidates": how})
    for shard in captions.iterdir():
        shard.rename(tmp_path / "made" / shard.name)
    made.finish()
    manifest = stage.run(tmp_path / "made", tmp_path / "out", RefineConfig())
    assert (manifest["rows_in"], manifest["samples"], manifest["kept"], manifest["rejected"]) == (7, 25, 24, 1)
    found = rows(tmp_path / "out")
    for number, text in enumerate(FOUND):
        assert [new for old, new in found if old == text] == [
            text,
            *(f"sign {number} says {word}" for word in ("open", "shut", "sale")),
        ]
    ids = read_shards(tmp_path / "out")["sample_id"].to_pylist()
    assert len(set(ids)) == 24 and len({*map(source_id, ids)}) == 6
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["funnel"][0]["rows_in"] == 25 and metrics["after"]["rows"] == 24


def test_a_mix_takes_both_one_by_chance_or_the_better(captions: Path, tmp_path: Path) -> None:
    both = stage.run(captions, tmp_path / "both", RefineConfig(mix=MixConfig("both")))
    assert (both["samples"], both["kept"]) == (13, 12)
    stage.run(captions, tmp_path / "random", RefineConfig(mix=MixConfig("random", share=0.5)))
    chosen = [new == old for old, new in rows(tmp_path / "random")]
    assert len(chosen) == 6 and 0 < sum(chosen) < 6
    stage.run(captions, tmp_path / "new", RefineConfig(mix=MixConfig("random", share=1.0)))
    stage.run(captions, tmp_path / "plain", RefineConfig())
    assert rows_digest(tmp_path / "new") == rows_digest(tmp_path / "plain") != rows_digest(tmp_path / "random")

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("process:\n  - words_num_filter: {min_num: 0, max_num: 6}\n")
    better = RefineConfig(recipe=str(recipe), mix=MixConfig("score", score="num_words"))
    manifest = stage.run(captions, tmp_path / "better", better)
    assert (manifest["kept"], manifest["rejected"]) == (6, 7)
    # as found they have 2 to 7 words; seven are filtered out, and "sign 3 says open" has three that are no numbers
    words = dict(rows(tmp_path / "better"))
    assert [words[text] == text for text in FOUND] == [False, True, True, True, True, False]
    ids = read_shards(captions)["sample_id"].unique().to_pylist()
    assert read_shards(tmp_path / "better")["sample_id"].to_pylist() == ids
    fewer = RefineConfig(recipe=str(recipe), mix=MixConfig("score", score="-num_words", share=0.2))
    stage.run(captions, tmp_path / "fewer", fewer)
    assert sum(new != old for old, new in rows(tmp_path / "fewer")) == 1 + 1  # of five, and the one that stands alone
    with pytest.raises(UserError, match="refine.mix.score: no operator of the recipe computes 'clip' .*num_words"):
        unknown = RefineConfig(recipe=str(recipe), mix=MixConfig("score", score="clip"))
        stage.run(captions, tmp_path / "unknown", unknown)


def test_a_smaller_subset_is_part_of_a_larger_one(captions: Path, tmp_path: Path) -> None:
    ids = []
    for count in (2, 4, 100):
        manifest = stage.run(captions, tmp_path / str(count), RefineConfig(subset=SubsetConfig(count)))
        ids.append(set(read_shards(tmp_path / str(count))["sample_id"].to_pylist()))
        assert manifest["kept"] == len(ids[-1]) == min(count, 6)
    assert ids[0] < ids[1] < ids[2]
    assert read_shards(tmp_path / "2" / "rejects")["reject_reason"].to_pylist().count("subset") == 4
    stage.run(captions, tmp_path / "plain", RefineConfig())
    assert rows_digest(tmp_path / "100") == rows_digest(tmp_path / "plain")
