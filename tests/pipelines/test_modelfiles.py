"""Which model a directory is: by what decides its answers, wherever it lies, and quickly the second time."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from pipelines import digests
from pipelines.digests import file_digests
from pipelines.errors import UserError
from pipelines.modelfiles import model_identity


def test_identity_is_of_what_decides_the_answers(model_dir: Path, tmp_path: Path) -> None:
    """Notes, a captune stage's own files and an unused copy of the weights change nothing; every other file does."""
    copy = shutil.copytree(model_dir, tmp_path / "copy")
    for name in ("README.md", "MANIFEST.json", ".stage.json", "pytorch_model.bin"):
        (copy / name).write_text("{}")
    assert model_identity(copy) == model_identity(model_dir)
    seen = {model_identity(model_dir)}
    for file in sorted(model_dir.iterdir()):
        other = shutil.copytree(model_dir, tmp_path / file.name)
        (other / file.name).write_bytes(file.read_bytes() + b" ")
        seen.add(model_identity(other))
    assert len(seen) == 1 + len(list(model_dir.iterdir()))
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="no weights there"):
        model_identity(copy)
    with pytest.raises(UserError, match=r"config\.json is missing"):
        model_identity(tmp_path)


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of several blocks, written an hour ago."""
    monkeypatch.setattr(digests, "_BLOCK", 1 << 20)
    monkeypatch.setattr(digests, "_SETTLED_NS", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "large"
    file.write_bytes(os.urandom((3 << 20) + 5))
    time.sleep(0.02)  # older than the tick of the file system's clock
    return file


def test_a_digest_is_remembered_until_the_file_changes(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An untouched file is not read again; one replaced under its name, size and times alike, is."""
    [first] = file_digests([large])
    with monkeypatch.context() as unread:
        unread.setattr(digests, "_block_digest", lambda *_: pytest.fail("read again"))
        assert file_digests([large]) == [first]
    content, times = bytearray(large.read_bytes()), (large.stat().st_atime_ns, large.stat().st_mtime_ns)
    content[2 << 20] ^= 1
    large.write_bytes(content)
    os.utime(large, ns=times)
    assert file_digests([large]) != [first]


def test_without_a_cache_everything_is_read(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that cannot be written, or holds rubbish, costs time and nothing else."""
    [first] = file_digests([large])
    for entry in (Path(os.environ["XDG_CACHE_HOME"]) / "captune" / "digests").iterdir():
        entry.write_text("rubbish")
    assert file_digests([large]) == [first]
    monkeypatch.setenv("XDG_CACHE_HOME", str(large / "no directory"))
    assert file_digests([large]) == [first]
