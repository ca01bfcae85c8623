"""Why a job waits: one line for each cause, read from what Kubernetes and KubeRay write down about it.

KubeRay copies a head that does not start into `.status.rayClusterStatus.conditions`; pods that no node has room for,
images and volumes are only in the pods and their events, and what waits in a queue in Kueue's Workload.
"""

from __future__ import annotations

import re
import time
from calendar import timegm
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from k8s import doctor, nodes, room
from k8s.kubectl import Kubectl
from pipelines.groups import LABEL

Object = dict[str, Any]
QUEUE = "kueue.x-k8s.io/queue-name"
_COMPONENT = "app.kubernetes.io/component"
_IMAGE = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError")
_SECRET = re.compile(r'secret "([^"]+)" not found')
_KEY = re.compile(r"couldn't find key (\S+) in Secret (?:[^/\s]+/)?(\S+)")
_UNNOTICED_S = 20.0
"""The operator answers a new job within a second or two."""


@dataclass
class Look:
    """What was there when a job was looked at.

    Attributes:
        job: a RayJob, or a batch/v1 Job.
        pods: of its cluster and its submitter, or of the Job itself.
        events: warnings of the namespace, as core/v1 Events.
        workloads: Kueue's, of the namespace.
    """

    job: Object
    pods: list[Object] = field(default_factory=list)
    events: list[Object] = field(default_factory=list)
    workloads: list[Object] = field(default_factory=list)

    @property
    def status(self) -> Object:
        """The job's; empty before the operator has seen it."""
        return dict(self.job.get("status") or {})

    @property
    def queued(self) -> bool:
        """It waits for Kueue, which lets it go when there is room: no reason to give up."""
        return QUEUE in self.job["metadata"].get("labels", {}) and bool(self.job["spec"].get("suspend"))


def causes(look: Look, kubectl: Kubectl) -> list[str]:
    """Every cause once, the job's own first."""
    found = [*_of_queue(look), *_of_operator(look), *_of_cluster(look, kubectl)]
    for pod in look.pods:
        found += _of_pod(pod, look, kubectl)
    return list(dict.fromkeys(found))


def _of_queue(look: Look) -> Iterator[str]:
    if look.queued:
        queue = look.job["metadata"]["labels"][QUEUE]
        told = next((_condition(each, "QuotaReserved") for each in look.workloads if _owned(each, look.job)), {})
        yield f"it waits in Kueue's queue {queue}: {told.get('message') or 'not admitted yet'}"


def _of_operator(look: Look) -> Iterator[str]:
    """A RayJob has no status at all until KubeRay's operator has seen it."""
    unseen = look.job["kind"] == "RayJob" and not look.status.get("jobDeploymentStatus")
    if unseen and _age(look.job) > _UNNOTICED_S:
        yield "KubeRay's operator has not taken notice of the job; `captune k8s doctor` says whether it runs"


def _of_cluster(look: Look, kubectl: Kubectl) -> Iterator[str]:
    """What KubeRay says of the cluster: pods that the API server refuses, and a head that does not start."""
    conditions = look.status.get("rayClusterStatus", {}).get("conditions", [])
    for condition in conditions:
        if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
            yield _refused(condition.get("message") or condition["reason"])
    names = {look.job["metadata"]["name"], look.status.get("rayClusterName", "")}
    for event in look.events if not look.pods else []:
        if event["involvedObject"].get("name") in names and event["reason"].startswith(("Failed", "Invalid")):
            yield _refused(event["message"])
    if not any(_waiting(pod) for pod in look.pods):  # else the head's own pod says it better
        for condition in conditions:
            if condition["type"] == "HeadPodReady" and condition["status"] == "False" and condition.get("message"):
                yield from _of_container("the head", condition["reason"], condition["message"], look, kubectl)


def _refused(message: str) -> str:
    """A pod that the API server does not let in."""
    told = _short(message)
    if "exceeded quota" in message:
        return f"the namespace's quota is used up: {told}"
    if "violates PodSecurity" in message:
        return f"the namespace's pod security refuses it: {told}"
    return f"a pod is refused: {told}"


def _of_pod(pod: Object, look: Look, kubectl: Kubectl) -> Iterator[str]:
    who, status = _who(pod), pod.get("status", {})
    if status.get("phase") == "Pending":
        scheduled = _condition(pod, "PodScheduled")
        if scheduled.get("status") == "False" and scheduled.get("message"):
            yield _unscheduled(who, pod, scheduled["message"], look)
        name = pod["metadata"]["name"]
        for event in look.events:
            if event["involvedObject"].get("name") == name and event["reason"] in ("FailedMount", "FailedAttachVolume"):
                yield f"{who} waits for a volume: {_short(event['message'])}"
    for container in [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]:
        if waiting := container.get("state", {}).get("waiting"):
            yield from _of_container(who, waiting.get("reason", ""), waiting.get("message", ""), look, kubectl)
        for state in (container.get("state", {}), container.get("lastState", {})):
            if state.get("terminated", {}).get("reason") == "OOMKilled":
                yield f"{who} was killed because its memory was full ({_limit(pod, container['name'])})"


def _unscheduled(who: str, pod: Object, message: str, look: Look) -> str:
    """A pod that no node takes, and what it is that none has."""
    volumes = pod["spec"].get("volumes", [])
    claims = [v["persistentVolumeClaim"]["claimName"] for v in volumes if "persistentVolumeClaim" in v]
    if "ersistentVolumeClaim" in message or "persistentvolumeclaim" in message:
        why = [
            _short(event["message"])
            for event in look.events
            if event["involvedObject"].get("kind") == "PersistentVolumeClaim"
            and event["involvedObject"].get("name") in claims
        ]
        return f"{who} waits for the volumes {', '.join(claims)}: {why[-1] if why else _short(message)}"
    short = list(dict.fromkeys(re.findall(r"Insufficient ([^\s,.]+(?:\.[^\s,.]+)*)", message)))
    asks = room.shown(nodes.requests(pod["spec"]))
    if short:
        return f"{who} waits for {' and '.join(short)}: it asks for {asks}, and {_short(message)}"
    return f"{who} waits for a node that it may run on: it asks for {asks}, and {_short(message)}"


def _of_container(who: str, reason: str, message: str, look: Look, kubectl: Kubectl) -> Iterator[str]:
    """A container that does not start; `PodInitializing` and `ContainerCreating` are no causes."""
    if secret := _SECRET.search(message):
        keys = sorted(doctor.secrets(look.job).get(secret[1], set()))
        yield f"{who} waits for the secret {secret[1]}: {doctor.advice(kubectl, secret[1], *keys)}"
    elif key := _KEY.search(message):
        how = doctor.advice(kubectl, key[2], key[1], made=True)
        yield f"{who} waits for the key {key[1]} of the secret {key[2]}: {how}"
    elif reason in _IMAGE:
        mend = "--image names another; a registry of your own may want an imagePullSecret"
        yield f"{who} cannot have its image: {_short(message) or reason}; {mend}"
    elif reason in ("CreateContainerConfigError", "CreateContainerError", "RunContainerError"):
        yield f"{who} cannot start ({reason}): {_short(message)}"
    elif reason == "CrashLoopBackOff":
        yield f"{who} starts and ends again and again: {_short(message)}"


def _who(pod: Object) -> str:
    labels = pod["metadata"].get("labels", {})
    group = labels.get(LABEL) or labels.get("ray.io/group")
    if labels.get("ray.io/node-type") == "head" or group == "head":
        return "the head"
    return f"group {group}" if group else f"the {labels.get(_COMPONENT, 'pod')}"


def _waiting(pod: Object) -> bool:
    states = pod.get("status", {}).get("containerStatuses", [])
    return any((each.get("state", {}).get("waiting") or {}).get("message") for each in states)


def _limit(pod: Object, container: str) -> str:
    every = pod["spec"].get("containers", [])
    found: Object = next((each for each in every if each["name"] == container), {})
    return f"limit {found.get('resources', {}).get('limits', {}).get('memory', 'none')}"


def _owned(workload: Object, job: Object) -> bool:
    owners = workload["metadata"].get("ownerReferences", [])
    return any(each["kind"] == "RayJob" and each["name"] == job["metadata"]["name"] for each in owners)


def _condition(found: Object, kind: str) -> Object:
    every = found.get("status", {}).get("conditions", [])
    return dict(next((each for each in every if each["type"] == kind), {}))


def _age(found: Object) -> float:
    """Seconds since it was made."""
    made = found["metadata"].get("creationTimestamp")
    return time.time() - timegm(time.strptime(made, "%Y-%m-%dT%H:%M:%SZ")) if made else 0.0


def _short(message: str) -> str:
    """One line without what changes from look to look."""
    line = " ".join(message.split()).partition(" preemption:")[0]
    return line if len(line) <= 300 else f"{line[:297]}..."
