"""Following one job to its end: its status, its log and the reasons why it waits, whatever attempt it is at."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, TextIO

from k8s.causes import Look, causes
from k8s.kubectl import Kubectl, Unreachable
from pipelines.errors import UserError, WorkFailed
from pipelines.progress import clock, say

Object = dict[str, Any]
EVERY_S = 4.0
"""Between two looks at the cluster."""
_DRAINED_S = 30.0
"""How long the rest of a log may take once its job is over."""
_SENTENCE = re.compile(r"^captune: (error|failed): (.*)")


class Log:
    """What the pods of a job print, on the terminal and in a file beside the report."""

    def __init__(self, kubectl: Kubectl, file: Path) -> None:
        self._kubectl, self._file = kubectl, file
        self._pod, self._last, self._thread = "", "", threading.Thread()
        self._call: subprocess.Popen[str] | None = None
        self._error: list[str] = []
        self.mends = False

    def of(self, pods: list[Object]) -> None:
        """Read the newest pod that has started; the one that was read is left when it is gone."""
        started = [p for p in pods if p.get("status", {}).get("phase") in ("Running", "Succeeded", "Failed")]
        newest = max(started, key=lambda p: p["metadata"]["creationTimestamp"], default=None)
        if newest is None or self._thread.is_alive():
            return
        name = newest["metadata"]["name"]
        if name != self._pod:
            self._pod, self._last = name, ""
            self._error, self.mends = [], False  # what an earlier attempt ended with is no reason for this one's end
        elif newest["status"]["phase"] != "Running":
            return  # it is over, and was read to its end
        self._read()

    def finish(self) -> None:
        """Wait until what the pod printed is here."""
        if self._thread.ident is not None:
            self._thread.join(_DRAINED_S)
        self.close()

    def close(self) -> None:
        """Read no further."""
        if self._call is not None and self._call.poll() is None:
            self._call.terminate()

    @property
    def sentence(self) -> str:
        """The last error that captune named in the log, with the lines that belong to it."""
        return "\n".join(self._error)

    def _read(self) -> None:
        since = ["--since-time", self._last] if self._last else []
        words = self._kubectl.words("logs", "--follow", "--timestamps", *since, self._pod)
        self._call = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, errors="replace"
        )
        self._thread = threading.Thread(target=self._copy, args=(self._call.stdout,), daemon=True)
        self._thread.start()

    def _copy(self, stream: TextIO) -> None:
        seen = self._last
        with stream, self._file.open("a", encoding="utf-8") as kept:
            for line in stream:
                stamp, _, text = line.rstrip("\n").partition(" ")
                if seen and stamp <= seen:
                    continue  # the second with which a broken stream is taken up again
                self._last = stamp
                self._note(text)
                kept.write(f"{text}\n")
                kept.flush()
                print(text, flush=True)

    def _note(self, line: str) -> None:
        if found := _SENTENCE.match(line):
            self.mends, self._error = found[1] == "error", [found[2]]
        elif self._error and line.startswith("  "):
            self._error.append(line)


def until_over(kubectl: Kubectl, kind: str, name: str, title: str, log: Log, patience_s: float) -> None:
    """Follow a RayJob or a batch/v1 Job until it is over.

    Args:
        title: what it is to the user, e.g. `train enhanced (4 of 9)`.
        patience_s: how long it may wait for its start, all attempts together.

    Raises:
        UserError: it ended with what the user has to mend, in captune's own words.
        WorkFailed: it failed, was stopped or deleted, or waited longer than `patience_s`; then it is suspended, so that
            it holds nothing.
    """
    said: dict[str, str] = {}
    waiting, failed = time.monotonic(), 0

    def tell(about: str, what: str) -> None:
        if said.get(about) != what:
            said[about] = what
            say(f"k8s: {title}: {what}")

    while True:
        try:
            look = _look(kubectl, kind, name)
        except Unreachable as error:
            tell("api", f"{error}; asking again")
            time.sleep(EVERY_S)
            continue
        said.pop("api", None)
        state = _state(look)
        if failed < look.status.get("failed", 0) and state != "over" and look.job["kind"] == "RayJob":
            failed = look.status["failed"]
            log.finish()
            tell("attempt", _attempt(look, log))
        if state != "over":
            tell("state", _SAID[state])
        log.of([pod for pod in look.pods if _prints(pod)])
        why = causes(look, kubectl) if state != "over" else []
        for cause in why:
            tell(cause, cause)
        if state == "over":
            log.finish()
            _end(look, log, name)
            tell("state", "done")
            return
        if state == "runs" or look.queued:
            waiting = time.monotonic()
        elif time.monotonic() - waiting > patience_s:
            suspend(kubectl, kind, name)
            raise WorkFailed(_too_long(name, time.monotonic() - waiting, why))
        time.sleep(EVERY_S)


_SAID = {"waits": "waits for its pods", "runs": "runs", "again": "the next attempt comes, on a fresh cluster"}


def _look(kubectl: Kubectl, kind: str, name: str) -> Look:
    found = kubectl.every(f"{kind},pods")
    job = next((each for each in found if each["kind"] != "Pod" and each["metadata"]["name"] == name), None)
    if job is None:
        raise WorkFailed(f"{kind} {name} was deleted while it was followed; the same command starts it again")
    look = Look(job)
    mine = {"job-name": name, "ray.io/cluster": look.status.get("rayClusterName")}
    look.pods = [
        each
        for each in found
        if each["kind"] == "Pod" and any(each["metadata"].get("labels", {}).get(k) == v for k, v in mine.items() if v)
    ]
    if not look.pods or any(pod.get("status", {}).get("phase") == "Pending" for pod in look.pods):
        look.events = kubectl.every("events", "--field-selector", "type=Warning")
    if look.queued:
        look.workloads = kubectl.every("workloads.kueue.x-k8s.io")
    return look


def _prints(pod: Object) -> bool:
    """It is the submitter's, or the preflight's: no Ray node."""
    return "ray.io/cluster" not in pod["metadata"].get("labels", {})


def _state(look: Look) -> str:
    """waits, runs, again or over."""
    if look.job["kind"] == "Job":
        ended = any(_ended(look, kind) for kind in ("Complete", "Failed"))
        runs = any(pod.get("status", {}).get("phase") == "Running" for pod in look.pods)
        return "over" if ended else "runs" if runs else "waits"
    match look.status.get("jobDeploymentStatus"):
        case "Complete" | "Failed" | "ValidationFailed":
            return "over"
        case "Running":
            return "runs"
        case "Retrying":
            return "again"
    return "waits"


def _ended(look: Look, kind: str) -> Object | None:
    every = look.status.get("conditions", [])
    return next((each for each in every if each["type"] == kind and each["status"] == "True"), None)


def _attempt(look: Look, log: Log) -> str:
    """Between attempts KubeRay deletes the submitter with its log, and says nothing of why."""
    failed, most = look.status["failed"], look.job["spec"].get("backoffLimit", 0) + 1
    why = log.sentence or look.status.get("message") or look.status.get("reason") or "its log is in the run directory"
    return f"attempt {failed} of {most} failed: {why}"


def _end(look: Look, log: Log, name: str) -> None:
    """Nothing when it went well; else its own last sentence."""
    status = look.status
    if look.job["kind"] == "Job":
        if _ended(look, "Complete"):
            return
        told = log.sentence or (_ended(look, "Failed") or {}).get("message", "")
    elif status["jobDeploymentStatus"] == "ValidationFailed":
        raise UserError(f"KubeRay refuses {name}: {status.get('message', '')}")
    elif status["jobDeploymentStatus"] == "Complete":
        if status.get("jobStatus") == "SUCCEEDED":
            return
        told = f"was ended from outside ({status.get('jobStatus', 'no status')})"
    else:
        told = log.sentence or " ".join(filter(None, (status.get("reason"), status.get("message"))))
    if log.sentence and log.mends:
        raise UserError(f"{name}: {told}")
    raise WorkFailed(f"{name}: {told}")


def suspend(kubectl: Kubectl, kind: str, name: str) -> None:
    """Let a job go of everything that it holds; what it wrote stays."""
    kubectl.call("patch", kind, name, "--type", "merge", "--patch", '{"spec":{"suspend":true}}')


def _too_long(name: str, waited: float, why: list[str]) -> str:
    reasons = "\n  ".join(["", *why]) if why else " and Kubernetes names no reason; captune k8s doctor may"
    return (
        f"{name} waited {clock(waited)} for its start, and was suspended, so that it holds nothing:{reasons}\n"
        "mend that, and the same command continues; --patience gives it longer"
    )
