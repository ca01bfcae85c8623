"""`kubectl`, called as people call it: its answers as objects, its complaints as one sentence."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pipelines.errors import UserError, WorkFailed

Object = dict[str, Any]
_PATIENCE_S = 150.0
"""Longer than any call of these takes; a deletion may wait two minutes."""
_AWAY = re.compile(
    r"Unable to connect to the server|connection to the server .* was refused|i/o timeout|TLS handshake timeout"
    r"|connection refused|no such host|couldn't get current server API group list|unexpected EOF|etcdserver"
)
_NAMED = re.compile(r"^(error: |Error from server( \(\w+\))?: |The connection )")


class Unreachable(WorkFailed):
    """The API server does not answer; it may do so again in a moment."""


class Forbidden(UserError):
    """The API server does not let this user do that."""


@dataclass(frozen=True)
class Kubectl:
    """Calls of one namespace and context.

    Attributes:
        context: of the kubeconfig; empty for the current one.
    """

    namespace: str
    context: str = ""

    def words(self, *words: str) -> list[str]:
        """A whole command line."""
        context = ["--context", self.context] if self.context else []
        return ["kubectl", *context, "--namespace", self.namespace, *words]

    def shown(self, *words: str) -> str:
        """The same as people type it."""
        context = ["--context", self.context] if self.context else []
        return " ".join(["kubectl", *context, "-n", self.namespace, *words])

    def call(self, *words: str, given: str = "") -> str:
        """What a command prints; `given` is its standard input.

        Raises:
            Unreachable: no API server answers.
            Forbidden: the user may not.
            UserError: there is no kubectl, or it refuses; the message is its own sentence.
        """
        return self.bytes(*words, given=given).decode(errors="replace")

    def bytes(self, *words: str, given: str = "") -> bytes:
        """What a command prints, untouched."""
        try:
            done = subprocess.run(
                self.words(*words), input=given.encode(), capture_output=True, check=False, timeout=_PATIENCE_S
            )
        except subprocess.TimeoutExpired as error:
            raise Unreachable(f"kubectl {_plain(words)} has not answered in {_PATIENCE_S:g} s") from error
        except FileNotFoundError as error:
            raise UserError(
                "kubectl is not on the PATH; captune calls it as you do (kubernetes.io/docs/tasks/tools says how to "
                "get it)"
            ) from error
        if done.returncode:
            raise _refusal(words, done.stderr.decode(errors="replace"))
        return done.stdout

    def get(self, kind: str, name: str) -> Object | None:
        """One object, or None where there is none."""
        return self._json("get", kind, name, "--ignore-not-found", "--output", "json") or None

    def named(self, kind: str, names: Iterable[str]) -> dict[str, Object]:
        """Those of several objects that are there, by name."""
        if not (wanted := sorted(set(names))):
            return {}
        found = self._json("get", kind, *wanted, "--ignore-not-found", "--output", "json") or {"items": []}
        return {each["metadata"]["name"]: each for each in found.get("items", [found])}

    def every(self, kinds: str, *words: str) -> list[Object]:
        """Objects of a kind, or of several with commas between them."""
        return list(self._json("get", kinds, "--output", "json", *words, needs="items")["items"])

    def raw(self, path: str, needs: str) -> Object:
        """What the API server says at a path of its own: an object that has the key `needs`."""
        return self._json("get", "--raw", path, needs=needs)

    def apply(self, objects: Iterable[Object], *words: str) -> str:
        """Create or change objects; an unknown field is an error."""
        every = {"apiVersion": "v1", "kind": "List", "items": [*objects]}
        return self.call("apply", "--validate=strict", *words, "--filename", "-", given=json.dumps(every))

    def rules(self) -> Object:
        """What this user may do in the namespace: a SelfSubjectRulesReview's status."""
        asked = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview"}
        asked_of = json.dumps({**asked, "spec": {"namespace": self.namespace}})
        return dict(
            self._json("create", "--filename", "-", "--output", "json", given=asked_of, needs="status")["status"]
        )

    def _json(self, *words: str, given: str = "", needs: str = "") -> Object:
        """An answer that is a JSON object with the key `needs`; an empty one where none is needed.

        Raises:
            UserError: it is something else, as of a wrapper or a proxy that answers in kubectl's place.
        """
        text = self.call(*words, given=given)
        try:
            found = json.loads(text) if text.strip() or needs else {}
        except ValueError as error:
            raise UserError(f"kubectl {_plain(words)} answers with no JSON, but {text[:80]!r}") from error
        if not isinstance(found, dict) or (needs and needs not in found):
            lacks = f"an object with '{needs}'" if needs else "an object"
            raise UserError(f"kubectl {_plain(words)} answers with {text[:80]!r}, where {lacks} was to come")
        return found


def _refusal(words: Iterable[str], stderr: str) -> UserError | Unreachable:
    """kubectl's complaint as one sentence; warnings and its log lines are left out."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith("Warning:") and not re.match(r"[EWI]\d{4} ", line)]
    sentence = next((line for line in told if _NAMED.match(line)), (told or lines or ["no reason given"])[-1])
    if _AWAY.search(stderr):
        return Unreachable(f"the API server does not answer: {sentence} (`kubectl config current-context` names it)")
    command = _plain(words)
    sentence = _NAMED.sub("", sentence)
    if "(Forbidden)" in stderr:
        return Forbidden(f"kubectl {command}: {sentence}")
    return UserError(f"kubectl {command}: {sentence}")


def _plain(words: Iterable[str]) -> str:
    """A command as a sentence names it; how its answer is printed is nobody's business."""
    return " ".join(words).replace(" --output json", "").replace(" --ignore-not-found", "").replace(" --filename -", "")
