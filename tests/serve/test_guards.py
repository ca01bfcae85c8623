"""Keys, their limits and the audit log by themselves; over HTTP they are in test_endpoint.py."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import UserError
from serve import audit, keys
from serve.engine import Answer
from serve.errors import ApiError
from serve.limits import Ledger

SCOPE: dict[str, Any] = {"method": "POST", "path": "/v1/chat/completions", "client": ("10.0.0.7", 4711)}


def test_a_key_may_ask_so_often_a_minute_whichever_minute() -> None:
    ledger = Ledger()
    assert [ledger.take("ann", 2, now) for now in (0.0, 30.0)] == [0.0, 0.0]
    assert ledger.take("ann", 2, 50.0) == 10.0 and ledger.take("bob", 2, 50.0) == 0.0
    assert ledger.take("ann", 2, 60.0) == 0.0, "what was refused does not count"
    assert ledger.take("ann", 2, 61.0) == 29.0


def test_a_file_that_is_being_edited_or_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half an edit changes nothing; no file knows no key."""
    monkeypatch.setattr(keys, "_LOOK_EVERY_S", 0.0)
    file = tmp_path / "keys.yaml"
    header = f"Bearer {keys.add(file, 'ann')}"
    known = keys.Keys(file)
    whole = file.read_text()
    for torn in (whole[:20], "ann: {sha256: 12}", "- ann", "\x00"):
        file.write_text(torn)
        with pytest.raises(UserError, match=r"keys\.yaml"):
            keys.read(file)
        assert known.who(header).name == "ann"
    file.unlink()
    with pytest.raises(ApiError, match="not known"):
        known.who(header)
    file.write_text(whole)
    assert known.who(header.replace("Bearer", "bearer")).name == "ann"
    for wrong in ("", "Basic YTpi", "Bearer", "Bearer ünïcode"):
        with pytest.raises(ApiError) as refusal:
            known.who(wrong)
        assert refusal.value.status == 401


def test_the_log_holds_contents_without_pictures_where_asked_and_is_rotated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "_FILE_BYTES", 2000)
    log = audit.Audit(tmp_path / "log", "replica")
    shown = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 500}}
    said = [{"role": "user", "content": [shown, {"type": "text", "text": "wörds"}]}]
    for number in range(60):
        record = audit.Record(log, SCOPE, f"id-{number}", "ann", "captune")
        record.expected, record.answers = 1, [Answer("red", prompt_tokens=9, completion_tokens=2)]
        record.messages = audit.contents(said)
        record.close()
    left = audit.Record(log, SCOPE, "left", None, "captune")
    left.close()
    files = sorted((tmp_path / "log").iterdir())
    assert len(files) == 10 and all(file.stat().st_size <= 2000 for file in files)
    entries = {e["request_id"]: e for file in files for e in map(json.loads, file.read_text().splitlines())}
    last = entries["id-59"]
    assert (last["status"], last["key"], last["client"], last["completion_tokens"]) == (200, "ann", "10.0.0.7", 2)
    assert last["contents"]["messages"][0]["content"][1]["text"] == "wörds"
    assert "AAAA" not in "".join(file.read_text() for file in files)
    assert last["contents"]["answers"] == ["red"] and entries["left"]["status"] == 499
    assert last["time"].startswith(time.strftime("%Y-", time.gmtime()))
