"""The image without building it: what its Dockerfile promises, what enters the build, and the commands that Kubernetes
will start.

`python tests/drills/drill_image.py` builds it and runs a cluster of containers.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "k8s" / "Dockerfile"
CODE = ("pipelines", "ray_jobs", "serve", "k8s")
DEBIAN = "3.11.2"
"""Debian bookworm's own Python."""
COMPILERS = re.compile(r"\b(g\+\+|gcc|cpp|clang|make|cmake|ninja-build|build-essential|git|[\w.]+-dev)\b")


def stages() -> dict[str, list[tuple[str, str]]]:
    """Stage -> its instructions with their values, in order; arguments before the first stage are under ''."""
    with DOCKERFILE.open("rb") as stream:
        parser = DockerfileParser(fileobj=stream)
        found: dict[str, list[tuple[str, str]]] = {"": []}
        for line in parser.structure:
            if line["instruction"] == "FROM":
                name = line["value"].split(" AS ")[1]
                found[name] = []
            if line["instruction"] != "COMMENT":
                found[list(found)[-1]].append((line["instruction"], line["value"]))
    return found


def lineage(name: str) -> list[tuple[str, str]]:
    """Instructions that made a stage, its parents' first."""
    found = stages()
    parent = found[name][0][1].split(" AS ")[0]
    return (lineage(parent) if parent in found else []) + found[name]


def values(instructions: list[tuple[str, str]], kind: str) -> list[str]:
    return [value for instruction, value in instructions if instruction == kind]


def test_every_stage_begins_at_a_pinned_base() -> None:
    """One base for all stages, named by a build argument with an exact tag."""
    found = stages()
    (base,) = values(found[""], "ARG")
    assert re.fullmatch(r"BASE=[\w./-]+:[\d.]+-slim-bookworm", base)
    parents = {name: stage[0][1].split(" AS ")[0] for name, stage in found.items() if name}
    assert parents == {"python": "${BASE}", "dependencies": "python", "code": "dependencies", "captune": "python"}


def test_the_image_has_no_compilers_and_is_nobody_special() -> None:
    """It installs what KubeRay's probes need and nothing that builds; its user is a number, so that Kubernetes can
    check it.
    """
    image = lineage("captune")
    installed = " ".join(
        re.findall(r"apt-get install -y --no-install-recommends ([\w.+ -]+)", " ".join(values(image, "RUN")))
    )
    assert COMPILERS.search(" ".join(values(lineage("dependencies"), "RUN"))), "the pattern finds what it looks for"
    assert not COMPILERS.search(installed)
    assert {"bash", "wget", "grep", "ca-certificates"} <= set(installed.split())
    assert values(image, "USER") == ["1000:1000"]
    assert "useradd --uid 1000 --gid 1000 --create-home --home-dir /home/captune" in " ".join(values(image, "RUN"))
    assert "HOME=/home/captune" in " ".join(values(image, "ENV"))
    assert json.loads(values(image, "CMD")[0])[0] == "captune"
    assert not values(image, "ENTRYPOINT"), "KubeRay sets the command; `captune` and `ray` are both on PATH"


def test_layers_keep_no_caches_and_no_secrets() -> None:
    image, built = lineage("captune"), stages()["dependencies"]
    for run in values(image, "RUN"):
        assert "apt-get update" not in run or "rm -rf /var/lib/apt/lists/* /var/cache/apt/*" in run
        assert "pip install" not in run or {"--no-cache-dir", "--no-index", "--no-deps"} <= set(run.split())
    assert "PIP_NO_CACHE_DIR=1" in " ".join(values(built, "ENV"))
    downloads = [run for run in values(built, "RUN") if re.search(r"\bpip install\b", run)]
    assert len(downloads) == 3
    assert all("--mount=type=secret,id=pip.conf" in run and "--constraint constraints.txt" in run for run in downloads)
    settings = " ".join(values(image, "ENV") + values(image, "ARG") + values(image, "LABEL"))
    assert not re.search(r"(?i)pip_|proxy|index|auth|password", settings)
    assert all(value.startswith("--from=") for value in values(image, "COPY")), "nothing of the build context as it is"
    assert "NVIDIA_VISIBLE_DEVICES" not in settings, "it would show a node's GPUs to pods that asked for none"
    labels = " ".join(values(image, "LABEL"))
    for label in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{label}=" in labels


def test_the_build_context_is_what_the_dockerfile_copies() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copies = values(stages()["dependencies"], "COPY") + values(stages()["code"], "COPY")
    assert {source for copy in copies for source in copy.split()[:-1]} == allowed
    assert all((ROOT / name).exists() for name in allowed)


def test_every_package_in_the_image_is_pinned() -> None:
    """captune's dependencies and theirs, as they are installed here, each stand in constraints.txt with a version for
    any Python 3.11.
    """
    pins = {
        canonicalize_name(name): version
        for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    todo, seen = [Requirement(line) for line in project["dependencies"]], set()
    while todo:
        wanted = todo.pop()
        extras = wanted.extras or {""}
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        name = canonicalize_name(wanted.name)
        if (name, frozenset(extras)) in seen:
            continue
        seen.add((name, frozenset(extras)))
        found = metadata.distribution(name)
        # setuptools comes before there are constraints: it belongs to the making of the environment.
        assert name in pins or name == "setuptools", f"{name} has no line in constraints.txt"
        if pins.get(name) == found.version:
            assert found.metadata.get("Requires-Python") is None or DEBIAN in SpecifierSet(
                found.metadata.get("Requires-Python")
            ), name
        for line in found.requires or []:
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                needed.marker = None
                todo.append(needed)
    assert len(seen) > 100


@pytest.mark.heavy
def test_the_wheel_holds_every_file_that_git_tracks(tmp_path: Path) -> None:
    """Recipes, templates and the sample's models reach the image; a new kind of file needs a line in pyproject.toml."""
    words = [
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "--wheel-dir",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run([sys.executable, "-m", *words], check=True, cwd=tmp_path, timeout=300)
    with zipfile.ZipFile(next(tmp_path.glob("captune-*.whl"))) as wheel:
        held = set(wheel.namelist())
    tracked = subprocess.run(
        ["git", "ls-files", *CODE], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    assert "pipelines/recipes/sample.yaml" in held
    assert {name for name in tracked if not name.endswith((".png", "Dockerfile"))} <= held
    assert {name.split("/")[0] for name in held if "dist-info" not in name} == set(CODE)


def test_the_commands_that_kubernetes_starts_are_there() -> None:
    """KubeRay waits for the head with `ray health-check` and submits with `ray job submit`; both are in Ray's command
    line.
    """
    ray = str(Path(sys.executable).with_name("ray"))
    for words in (["health-check", "--help"], ["job", "submit", "--help"]):
        done = subprocess.run([ray, *words], capture_output=True, text=True, check=True, timeout=120)
        assert "--address" in done.stdout
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"captune": "ray_jobs.cli:main"}
