"""A stage's output directory: skipped when complete, continued when half done, refused when it is another run's."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.errors import UserError
from pipelines.manifest import identity, open_stage, read_json, require_finished, training_text, write_json
from pipelines.records import new_record, write_shard


@dataclass
class Settings:
    model: str = "a"
    steps: int = 1


def test_claim_resume_complete(tmp_path: Path) -> None:
    """First call starts, second continues, and after `finish` the third is told that all is done."""
    out = tmp_path / "out"
    first = open_stage(out, "caption", {"config": Settings(), "input": Path("x")})
    assert not first.resumed and not first.complete
    assert open_stage(out, "caption", {"config": Settings(), "input": Path("x")}).resumed
    manifest = first.finish(rows_in=3)
    third = open_stage(out, "caption", {"config": Settings(), "input": Path("x")})
    assert third.complete and third.manifest == manifest and manifest["rows_in"] == 3


def test_other_runs_are_refused_by_what_changed(tmp_path: Path) -> None:
    """The message names the changed key; `restart` clears what a stage wrote and never what it did not."""
    out = tmp_path / "out"
    open_stage(out, "caption", {"config": Settings()})
    (out / "half.parquet").touch()
    with pytest.raises(UserError, match=r"what changed: config\.steps"):
        open_stage(out, "caption", {"config": Settings(steps=2)})
    with pytest.raises(UserError, match="stage 'caption', not of 'refine'"):
        open_stage(out, "refine", {"config": Settings()})
    assert not open_stage(out, "caption", {"config": Settings(steps=2)}, restart=True).resumed
    assert not (out / "half.parquet").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    for restart in (False, True):
        with pytest.raises(UserError, match="no captune stage wrote"):
            open_stage(tmp_path / "mine", "caption", {}, restart=restart)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_identity_and_json(tmp_path: Path) -> None:
    """Identity follows contents, a stage's output is its fingerprint, and broken JSON is named."""
    for name in ("a", "b"):
        write_json(tmp_path / name / "x.json", {"k": 1})
    assert identity(tmp_path / "a") == identity(tmp_path / "b")
    write_json(tmp_path / "b" / "x.json", {"k": 2})
    assert identity(tmp_path / "a") != identity(tmp_path / "b")
    claimed = open_stage(tmp_path / "out", "s", {})
    assert identity(tmp_path / "out") == claimed.fingerprint
    with pytest.raises(UserError, match="no such file"):
        identity(tmp_path / "gone")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match=r"bad\.json: not valid JSON"):
        read_json(tmp_path / "bad.json")


def test_a_stage_that_has_not_ended_is_refused_by_its_name(tmp_path: Path) -> None:
    """What no stage wrote is nobody's to refuse."""
    require_finished(tmp_path / "gone")
    require_finished(tmp_path)
    stage = open_stage(tmp_path / "out", "refine", {})
    for asked in (require_finished, training_text):
        with pytest.raises(UserError, match=r"out: captune refine has not finished"):
            asked(tmp_path / "out")
    stage.finish()
    require_finished(tmp_path / "out")


def test_which_text_trains(tmp_path: Path) -> None:
    """The column a dataset was refined for; the new captions of `captune caption`; without a manifest, those that are
    there.
    """
    for text in ("caption", "recaption"):
        open_stage(tmp_path / text, "refine", {}).finish(text=text)
        assert training_text(tmp_path / text) == text
    open_stage(tmp_path / "captions", "caption", {}).finish()
    assert training_text(tmp_path / "captions") == "recaption"
    record = new_record("as found", image=b"x")
    write_shard(tmp_path / "bare" / "0.parquet", [record])
    assert training_text(tmp_path / "bare") == "caption"
    record["recaption"] = "new"
    write_shard(tmp_path / "bare" / "1.parquet", [record])
    assert training_text(tmp_path / "bare") == "recaption"


def test_a_manifest_says_what_made_it_and_its_fingerprint_does_not_depend_on_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Command line, commit of the checkout, versions and machine."""
    found = []
    for number, words in enumerate((["captune", "caption", "my data"], ["captune", "run", "r.yaml"])):
        monkeypatch.setattr("sys.argv", words)
        found.append(open_stage(tmp_path / str(number), "caption", {}).finish())
    assert [manifest["command"] for manifest in found] == ["captune caption 'my data'", "captune run r.yaml"]
    assert found[0]["fingerprint"] == found[1]["fingerprint"]
    assert found[0]["machine"]["cpus"] >= 1 and found[0]["machine"]["memory_gib"] > 0
    assert found[0]["versions"]["captune"]
    root = Path(__file__).parents[2]
    if (root / ".git").exists():
        head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        assert found[0]["commit"].rstrip("+") == head
