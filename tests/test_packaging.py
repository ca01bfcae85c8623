"""What is imported is declared, and what is declared is imported, or stands below with the reason why not."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = ("pipelines", "ray_jobs", "serve", "k8s")
UNIMPORTED = {
    "ninja": "DeepSpeed builds its operator for CPUs with it",
    "sentencepiece": "transformers makes a tokenizer of a `tokenizer.model` with it",
    "protobuf": "the same reads such a file with it",
    "tensorboard": "torch.utils.tensorboard writes with it",
    "bitsandbytes": "transformers loads 4-bit and 8-bit weights with it",
}
WITH_CARDS = {"triton"}
"""PyTorch's CUDA build brings it along, the CPU build has none: imported where there is a card."""
ASKED_FOR = "trackers"
"""The extra whose packages are imported when a key of a recipe names them, and by nobody else."""
TOOLS = {"kubernetes-validate", "mypy", "pre-commit", "pytest-timeout", "pytest-xdist", "ruff", "types-pyyaml"}
"""Of `dev`: run by their names or read as files, not imported."""
ELSEWHERE = {"mgm"}
"""The original code, for the recorder that runs where it is."""


def _name(requirement: str) -> str:
    """The distribution that a requirement names, normalized."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()  # type: ignore[index]


def _modules(file: Path) -> set[str]:
    """Top-level modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module or "")
    return {name.partition(".")[0] for name in found}


def _imported(*folders: str) -> set[str]:
    """Distributions that the files below some folders import; a module's own name where none is installed for it."""
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    # what is started by its path finds the files beside it by their names; `_typeshed` is the type checker's own
    beside = {file.stem for folder in ("ray_jobs", "tests/bench") for file in (ROOT / folder).iterdir()}
    modules = {name for file in files for name in _modules(file)} - sys.stdlib_module_names
    modules -= {*OURS, "tests", "_typeshed", *beside}
    known = packages_distributions()
    return {_name(known.get(module, [module])[0]) for module in modules}


def test_every_import_of_the_package_is_declared_and_nothing_else_is() -> None:
    declared = {_name(requirement) for requirement in PROJECT["dependencies"]}
    asked_for = {_name(requirement) for requirement in PROJECT["optional-dependencies"][ASKED_FOR]}
    imported = _imported(*OURS)
    assert imported - declared == WITH_CARDS | asked_for, "imported, but nobody promises that it is installed"
    assert declared - imported - set(UNIMPORTED) == set(), "declared, but nothing imports it, and no reason is given"
    assert set(UNIMPORTED) & imported == set(), "a reason for what is imported after all"


def test_what_only_tests_import_is_declared_for_development() -> None:
    extras = PROJECT["optional-dependencies"]
    needed = (
        _imported("tests") - ELSEWHERE - WITH_CARDS - {_name(requirement) for requirement in PROJECT["dependencies"]}
    )
    assert needed == {_name(requirement) for requirement in extras["dev"]} - TOOLS
    others = {
        _name(requirement)
        for extra, found in extras.items()
        if extra not in ("dev", ASKED_FOR)
        for requirement in found
    }
    assert others <= set(UNIMPORTED) <= {_name(r) for r in PROJECT["dependencies"]} | others, "a reason for nothing"


def test_every_requirement_has_its_tested_version() -> None:
    """What has no line in constraints.txt is another package tomorrow."""
    pinned = {_name(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    asked = [
        *PROJECT["dependencies"],
        *(entry for extra in PROJECT["optional-dependencies"].values() for entry in extra),
    ]
    assert {_name(requirement) for requirement in asked} - pinned == set()
