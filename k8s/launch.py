"""`captune k8s run`: from manifests to the report, a job for each stage in turn; what is finished is not done again."""

from __future__ import annotations

import io
import shutil
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k8s import doctor, follow, render
from k8s.causes import QUEUE
from k8s.kubectl import Kubectl
from k8s.kustomize import CLUSTER_WIDE
from pipelines.errors import NotReady, Problem, UserError, WorkFailed
from pipelines.progress import say
from pipelines.rundir import RECIPE, RunDir
from ray_jobs.recipe import Recipe

Object = dict[str, Any]
_READER_S = 300.0
"""How long the small pod that reads the report may take to start."""
_READER_LIVES_S = 900


@dataclass(frozen=True)
class Plan:
    """What has to be applied.

    Attributes:
        shared: what all jobs need.
        preflight: a Job that looks at everything before any cluster exists.
        jobs: a RayJob for each stage, or one of all, in their order.
        titles: what each is to the user.
    """

    shared: list[Object]
    preflight: Object
    jobs: list[Object]
    titles: list[str]

    @property
    def objects(self) -> list[Object]:
        """All of it."""
        return [*self.shared, self.preflight, *self.jobs]

    @property
    def namespace(self) -> str:
        """Where the jobs are."""
        return str(self.jobs[0]["metadata"]["namespace"])


def plan(recipe: Recipe, overlay: str, image: str = "", whole: bool = False) -> Plan:
    """Manifests of a run.

    Raises:
        UserError: the recipe does not fit the overlay.
    """
    steps = [render.Step("run")] if whole else render.stages(recipe)
    *shared, preflight = render.render(recipe, overlay, "preflight", image=image)
    jobs = [render.render(recipe, overlay, step.workload, step.arm, step.seed, image)[-1] for step in steps]
    names = [" ".join(map(str, (part for part in step if part not in ("", None)))) for step in steps]
    titles = [f"{name} ({at} of {len(names)})" if len(names) > 1 else name for at, name in enumerate(names, 1)]
    return Plan(shared, preflight, jobs, titles)


def run(recipe: Recipe, wanted: Plan, kubectl: Kubectl, place: Path, patience_s: float) -> Path | None:
    """Everything, to the report below `place`; returns its page, which a recipe without arms does not have.

    Raises:
        UserError: the cluster lacks something, the preflight refuses, or a job of another recipe is at work.
        WorkFailed: a job failed or waited longer than `patience_s`.
    """
    if (place / RECIPE).exists():
        raise UserError(f"{place} holds a run of this machine; --output names another place for the report")
    require(doctor.examine(kubectl, wanted.objects))
    there = kubectl.named("rayjobs", (job["metadata"]["name"] for job in wanted.jobs))
    states = [_state(there.get(job["metadata"]["name"]), job) for job in wanted.jobs]
    if not all(state == "done" for state in states):
        _prepare(kubectl, wanted)
        if "active" not in states:
            _preflight(kubectl, wanted, place, patience_s)
    for job, title, state in zip(wanted.jobs, wanted.titles, states, strict=True):
        if state == "done":
            say(f"k8s: {title}: done before")
            continue
        _let_go(kubectl, job, title, state)
        with _log(kubectl, place, job) as log:
            follow.until_over(kubectl, "rayjobs", job["metadata"]["name"], title, log, patience_s)
    return fetch(recipe, wanted, kubectl, place) if recipe.arms else None


def require(findings: list[doctor.Finding]) -> None:
    """Refuse to begin while the cluster lacks something; say what could not be found out.

    Raises:
        NotReady: with all that is missing.
    """
    for finding in findings:
        if finding.state == doctor.UNKNOWN:
            say(f"k8s: {finding.about}: {finding.says}")
    if missing := [Problem(each.about, each.says) for each in findings if each.state == doctor.MISSING]:
        raise NotReady(missing)


def _state(found: Object | None, job: Object) -> str:
    """What the cluster has of a job: none, active, done, or over (it failed, was stopped, or was suspended).

    Raises:
        UserError: it is at work for another recipe.
    """
    if found is None:
        return "none"
    status = found.get("status") or {}
    now = status.get("jobDeploymentStatus", "")
    same = _digest(found) == _digest(job)
    if now in ("Complete", "Failed", "ValidationFailed"):
        return "done" if same and now == "Complete" and status.get("jobStatus") == "SUCCEEDED" else "over"
    if now in ("Suspended", "Suspending") and QUEUE not in found["metadata"].get("labels", {}):
        return "over"
    if not same:
        name, place = found["metadata"]["name"], found["metadata"]["namespace"]
        raise UserError(
            f"{name} is at work for another recipe ({now or 'just applied'}). Let it end, stop it with kubectl -n "
            f"{place} delete rayjob {name}, or give this recipe a run_dir of its own"
        )
    return "active"


def _digest(found: Object) -> str:
    return str(found["metadata"].get("annotations", {}).get(render.DIGEST, ""))


def _prepare(kubectl: Kubectl, wanted: Plan) -> None:
    """The API server looks at everything; then what all jobs share is applied. Objects of the whole cluster that are
    there are left alone: not everybody may touch them.
    """
    kubectl.call(
        "delete", "jobs.batch", wanted.preflight["metadata"]["name"], "--ignore-not-found", "--timeout", "120s"
    )
    shared = [each for each in wanted.shared if each["kind"] not in CLUSTER_WIDE]
    for kind in CLUSTER_WIDE:
        wide = {each["metadata"]["name"]: each for each in wanted.shared if each["kind"] == kind}
        there = kubectl.named(kind.lower(), wide)
        shared = [each for name, each in wide.items() if name not in there] + shared
    kubectl.apply([*shared, wanted.preflight, *wanted.jobs], "--dry-run=server")
    kubectl.apply(shared)


def _preflight(kubectl: Kubectl, wanted: Plan, place: Path, patience_s: float) -> None:
    """Everything that cannot work is found on one small pod, before any cluster exists."""
    kubectl.apply([wanted.preflight])
    with _log(kubectl, place, wanted.preflight) as log:
        follow.until_over(kubectl, "jobs.batch", wanted.preflight["metadata"]["name"], "preflight", log, patience_s)


def _let_go(kubectl: Kubectl, job: Object, title: str, state: str) -> None:
    """Apply a job; one that is over goes first, and one that is at work is followed."""
    name = job["metadata"]["name"]
    if state == "active":
        say(f"k8s: {title}: at work already as {name}")
        return
    if state == "over":
        say(f"k8s: {title}: it did not succeed before, and is begun again where it stopped")
        kubectl.call("delete", "rayjobs", name, "--ignore-not-found", "--timeout", "120s")
    kubectl.apply([job])


@contextmanager
def _log(kubectl: Kubectl, place: Path, job: Object) -> Iterator[follow.Log]:
    """The log of a job in a file; Ctrl-C leaves the job at work and says so."""
    name, kind = job["metadata"]["name"], job["kind"].lower()
    file = RunDir(place).log(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    log = follow.Log(kubectl, file)
    try:
        yield log
    except KeyboardInterrupt:
        stop = kubectl.shown("delete", kind, name)
        say(f"k8s: {name} works on in the cluster; the same command follows it again, `{stop}` stops it")
        raise
    finally:
        log.close()


def fetch(recipe: Recipe, wanted: Plan, kubectl: Kubectl, place: Path) -> Path:
    """The report from the volume, by a small pod: clusters of jobs are gone minutes after their end.

    Raises:
        WorkFailed: the pod does not start, or there is no report.
    """
    theirs, mine = RunDir(Path(recipe.run_dir)), RunDir(place)
    pod = _reader(wanted.preflight)
    name = pod["metadata"]["name"]
    kubectl.call("delete", "pod", name, "--ignore-not-found", "--timeout", "120s")
    kubectl.apply([pod])
    try:
        _wait_for(kubectl, name)
        folder = theirs.report.parent
        packed = kubectl.bytes("exec", name, "--", "tar", "-C", str(folder.parent), "-cf", "-", folder.name)
    except UserError as error:
        raise WorkFailed(f"all jobs are done, but the report could not be fetched: {error}") from error
    finally:
        kubectl.call("delete", "pod", name, "--ignore-not-found", "--wait=false")
    shutil.rmtree(mine.report.parent, ignore_errors=True)
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(place, filter="data")
    return mine.report


def _reader(preflight: Object) -> Object:
    """A pod with the preflight's image, volumes and rights that does nothing."""
    about, template = preflight["metadata"], preflight["spec"]["template"]
    (container,) = template["spec"]["containers"]
    idle = {**container, "command": ["sleep", str(_READER_LIVES_S)]}
    idle.pop("args", None)
    idle["resources"] = {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}}
    metadata = {
        "name": f"{about['name']}-reader",
        "namespace": about["namespace"],
        "labels": template.get("metadata", {}).get("labels", {}),
    }
    spec = {**template["spec"], "containers": [idle], "restartPolicy": "Never"}
    spec["activeDeadlineSeconds"] = _READER_LIVES_S
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def _wait_for(kubectl: Kubectl, name: str) -> None:
    """Until a pod runs.

    Raises:
        WorkFailed: it does not.
    """
    deadline = time.monotonic() + _READER_S
    while True:
        pod = kubectl.get("pod", name) or {}
        phase = pod.get("status", {}).get("phase", "")
        if phase == "Running":
            return
        if phase in ("Failed", "Succeeded") or time.monotonic() > deadline:
            do = kubectl.shown("describe", "pod", name)
            raise WorkFailed(f"all jobs are done, but the pod that reads the report does not start; {do} says why")
        time.sleep(follow.EVERY_S)
