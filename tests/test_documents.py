"""What is read by people: no line is too long for half a screen, and no link or named file leads nowhere."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_jobs import cli
from ray_jobs._options import parse

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


def _commands(text: str) -> list[list[str]]:
    """Words of every captune command in a text, in blocks of code and in prose; placeholders stand as they are."""
    blocks = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.split(" #")[0].split(" | ")[0] for block in blocks for line in block.splitlines()]
    inline = [" ".join(found.split()).split(" | ")[0] for found in re.findall(r"`(captune [^`]*)`", text)]
    found = [shlex.split(line) for line in [*lines, *inline] if line.startswith("captune ")]
    return [words for words in found if "COMMAND" not in words]


def test_the_readme_names_every_command_as_it_is_taken() -> None:
    """Each parses with the parser of the command that it names; recipes that are not there are the sample's."""
    commands = _commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {words[1] for words in commands} == set(cli.COMMANDS)
    stand_ins = {"RECIPE": "sample", "my.yaml": "sample", "N": "8000", "O": "kind"}
    for _, command, *words in [words for words in commands if len(words) > 2]:  # others are mentioned, not shown
        room = importlib.import_module(cli.COMMANDS[command].room)
        about = room.COMMANDS[words[0]] if command == "k8s" else room.COMMAND
        parse(about, [stand_ins.get(word, word) for word in (words[1:] if command == "k8s" else words)])
