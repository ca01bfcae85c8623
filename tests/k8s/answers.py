"""A cluster for tests: the stand-in `kubectl` on the PATH, with recorded answers of a real API server.

The answers are those of Kubernetes 1.34 with KubeRay's operator 1.7.0, in `kube_answers/`; what that cluster lacked (a
namespace, secrets, a storage class) is added here, so that a test can take it away again.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

Object = dict[str, Any]
RECORDED = Path(__file__).parent / "kube_answers"
STAND_IN = Path(__file__).parent / "stand_in_kubectl.py"


class Stage:
    """What the stand-in answers, and what it was told."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def answer(self, kind: str, items: list[Object]) -> None:
        """What there is of a kind, e.g. `secret`."""
        (self.home / "answers" / f"{kind}.json").write_text(json.dumps({"kind": "List", "items": items}))

    def recorded(self, kind: str) -> list[Object]:
        """What there is of a kind now."""
        return list(json.loads((self.home / "answers" / f"{kind}.json").read_text())["items"])

    def play(self, plays: dict[str, Any]) -> None:
        """What happens to objects once they are applied; what they did before is forgotten, they are not."""
        (self.home / "play.json").write_text(json.dumps(plays))

    def have(self, found: Object) -> None:
        """An object that somebody applied before."""
        state = self._state()
        state["objects"][f"{found['kind'].lower()}/{found['metadata']['name']}"] = found
        (self.home / "state.json").write_text(json.dumps(state))

    def told(self) -> list[Object]:
        """Every call: its words, and its standard input."""
        file = self.home / "told.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def order(self) -> list[tuple[str, str]]:
        """Kind and name of everything that was applied, in order; dry runs are none."""
        calls = [call for call in self.told() if "apply" in call["words"] and "--dry-run=server" not in call["words"]]
        return [
            (each["kind"], each["metadata"]["name"]) for call in calls for each in json.loads(call["given"])["items"]
        ]

    def applied(self, kind: str) -> list[str]:
        """Names of a kind that were applied, in order."""
        return [name for found, name in self.order() if found == kind]

    def objects(self, kind: str) -> list[Object]:
        """What is there now of what was applied."""
        return [found for found in self._state()["objects"].values() if found["kind"] == kind]

    def _state(self) -> Object:
        return dict(json.loads((self.home / "state.json").read_text()))


def answers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """The stand-in on the PATH, for a cluster that has everything that the overlay `kind` needs."""
    home, programs = folder / "stand-in", folder / "bin"
    shutil.copytree(RECORDED, home / "answers")
    programs.mkdir()
    (programs / "kubectl").write_text(f"#!{sys.executable} -SE\n{STAND_IN.read_text()}")
    (programs / "kubectl").chmod(0o755)
    (home / "play.json").write_text("{}")
    (home / "state.json").write_text(json.dumps({"objects": {}, "plays": {}, "shown": {}}))
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    monkeypatch.setenv("STAND_IN", str(home))
    stage = Stage(home)
    levels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn", "audit")}
    stage.answer("namespace", [{"metadata": {"name": "captune", "labels": levels}}])
    stage.answer("secret", [secret("captune-ray-token", "auth_token"), secret("captune-redis", "password")])
    standard = {"storageclass.kubernetes.io/is-default-class": "true"}
    stage.answer("storageclass", [storage_class("standard", "rancher.io/local-path", standard)])
    (home / "answers" / "rules.json").write_text(json.dumps({"incomplete": False, "resourceRules": [EVERYTHING]}))
    return stage


EVERYTHING = {"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}


def secret(name: str, *keys: str) -> Object:
    """As the API server shows one."""
    return {"kind": "Secret", "metadata": {"name": name}, "data": dict.fromkeys(keys, "eA==")}


def storage_class(name: str, provisioner: str, annotations: Object | None = None) -> Object:
    """As the API server shows one."""
    metadata = {"name": name, "annotations": annotations or {}}
    return {"kind": "StorageClass", "metadata": metadata, "provisioner": provisioner}
