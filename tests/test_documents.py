"""What is read by people: no line is too long for half a screen, and no link or named file leads nowhere."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = 120
RECORDED = {".json", ".jsonl", ".jinja", ".safetensors", ".png", ".jpg"}
"""Data: recorded, drawn, or byte for byte what another program reads. Ruff holds the lines of Python."""
GUIDE = ROOT / ".github" / "CONTRIBUTING.md"


def _files() -> list[Path]:
    """Files that git tracks, or would when asked to."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [path for name in listed if (path := ROOT / name).is_file()]


DOCUMENTS = [path for path in _files() if path.suffix == ".md"]


def _prose(document: Path) -> str:
    """A document without its blocks of code."""
    return re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def _anchors(document: Path) -> set[str]:
    """What GitHub makes of the headings: lower case, no punctuation, a hyphen for each space."""
    headings = re.findall(r"^#+ (.*)$", _prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _broken(document: Path) -> Iterator[str]:
    """Links of a document that lead to no file, or to no heading of it."""
    for target in re.findall(r"\]\(([^)\s]+)\)", _prose(document)):
        if re.match(r"[a-z]+://", target):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        if not path.exists() or (anchor and anchor not in _anchors(path)):
            yield target


def test_lines_are_at_most_120_columns() -> None:
    long, read = [], 0
    for path in _files():
        if path.suffix in RECORDED | {".py"} or path.name == "exported_metrics.txt":
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        read += len(lines)
        long += [f"{path.relative_to(ROOT)}:{at}" for at, line in enumerate(lines, 1) if len(line) > COLUMNS]
    assert long == []
    assert read > 3000, "there is more to read than that"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    assert list(_broken(document)) == []


def test_a_link_to_nowhere_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# It's `here`, now\n")
    (tmp_path / "a.md").write_text("[1](b.md#its-here-now) [2](b.md#there) [3](c.md) [4](https://example.org/x)\n")
    assert list(_broken(tmp_path / "a.md")) == ["b.md#there", "c.md"]


def test_the_guide_names_files_that_are_there() -> None:
    """A stranger is sent to a file, never to where it was."""
    named = re.findall(r"`([\w./*-]+/[\w.*-]*|[\w-]+\.(?:toml|txt|md|yaml)|Makefile)`", _prose(GUIDE))
    assert len(set(named)) > 60
    assert [name for name in named if not any(ROOT.glob(name.rstrip("/")))] == []
