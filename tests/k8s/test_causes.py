"""Why a job waits, read from statuses, pods and events as Kubernetes and KubeRay write them."""

from __future__ import annotations

from typing import Any

import pytest

from k8s import kustomize, render
from k8s.causes import Look, causes
from k8s.kubectl import Kubectl
from tests.k8s import schemas

Object = dict[str, Any]
KUBECTL = Kubectl("captune")
MADE = "2026-11-26T08:00:00Z"
SECRET = "kubectl -n captune create secret generic captune-ray-token --from-literal=auth_token=$(openssl rand -hex 32)"


def job(status: Object, **more: Any) -> Object:
    spec = {"entrypoint": "captune run", "rayClusterSpec": cluster(), **more.pop("spec", {})}
    metadata = {
        "name": "captune-mine-train",
        "namespace": "captune",
        "creationTimestamp": MADE,
        **more,
    }
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec, "status": status}


def cluster() -> Object:
    head = {"template": {"spec": {"containers": [{"name": "ray-head", "image": "captune:0.1.0"}]}}}
    return {"authOptions": {"mode": "token", "secretName": "captune-ray-token"}, "headGroupSpec": head}


def initializing(*conditions: Object) -> Object:
    said = [{"lastTransitionTime": "2026-11-27T08:00:00Z", **each} for each in conditions]
    found = {"jobDeploymentStatus": "Initializing", "rayClusterName": "captune-mine-train-x7k2p"}
    return {**found, "rayClusterStatus": {"conditions": said}}


def pod(**status: Any) -> Object:
    container = {"name": "ray-worker", "image": "captune:0.1.0", "resources": {"limits": {"memory": "24Gi"}}}
    volume = {"name": "data", "persistentVolumeClaim": {"claimName": "captune-data"}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "p", "labels": {"captune.dev/group": "train"}},
        "spec": {"containers": [container], "volumes": [volume]},
        "status": {"phase": "Pending", **status},
    }


def container(**state: Any) -> Object:
    about = {"name": "ray-worker", "image": "captune:0.1.0", "imageID": "", "ready": False, "restartCount": 0}
    return {**about, **state}


def waiting(reason: str, message: str) -> Object:
    return container(state={"waiting": {"reason": reason, "message": message}})


def unscheduled(message: str) -> list[Object]:
    return [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}]


def event(kind: str, name: str, reason: str, message: str) -> Object:
    about = {"kind": kind, "name": name, "namespace": "captune"}
    metadata = {"name": f"{name}.18", "namespace": "captune"}
    kind = {"apiVersion": "v1", "kind": "Event", "metadata": metadata, "type": "Warning"}
    return {**kind, "involvedObject": about, "reason": reason, "message": message}


QUOTA = 'pods "h" is forbidden: exceeded quota: team, requested: requests.cpu=4, used: requests.cpu=8, limited: 8'
CASES = {
    "a secret that the head needs": (
        Look(
            job(
                initializing(
                    {
                        "type": "HeadPodReady",
                        "status": "False",
                        "reason": "CreateContainerConfigError",
                        "message": 'containers with unready status: [ray-head]; ray-head: secret "captune-ray-token" '
                        "not found",
                    }
                )
            )
        ),
        f"the head waits for the secret captune-ray-token: {SECRET}",
    ),
    "a key that a secret lacks": (
        Look(
            job(initializing()),
            [
                pod(
                    containerStatuses=[
                        waiting(
                            "CreateContainerConfigError",
                            "couldn't find key auth_token in Secret captune/captune-ray-token",
                        )
                    ]
                )
            ],
        ),
        "group train waits for the key auth_token of the secret captune-ray-token: kubectl -n captune delete secret "
        f"captune-ray-token && {SECRET}",
    ),
    "a quota": (
        Look(
            job(
                initializing(
                    {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreateHeadPod", "message": QUOTA}
                )
            )
        ),
        f"the namespace's quota is used up: {QUOTA}",
    ),
    "an image": (
        Look(job(initializing()), [pod(containerStatuses=[waiting("ErrImagePull", "manifest unknown")])]),
        "group train cannot have its image: manifest unknown; --image names another; a registry of your own may want "
        "an imagePullSecret",
    ),
    "no card": (
        Look(
            job(initializing()),
            [
                pod(
                    conditions=unscheduled(
                        "0/2 nodes are available: 1 Insufficient cpu, 2 Insufficient nvidia.com/gpu. preemption: 0/2 "
                        "nodes are available: 2 No preemption victims found for incoming pod."
                    )
                )
            ],
        ),
        "group train waits for cpu and nvidia.com/gpu: it asks for 24 GiB, and 0/2 nodes are available: 1 Insufficient "
        "cpu, 2 Insufficient nvidia.com/gpu.",
    ),
    "no label": (
        Look(
            job(initializing()),
            [
                pod(
                    conditions=unscheduled(
                        "0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector."
                    )
                )
            ],
        ),
        "group train waits for a node that it may run on: it asks for 24 GiB, and 0/1 nodes are available: 1 node(s) "
        "didn't match Pod's node affinity/selector.",
    ),
    "a volume that nobody makes": (
        Look(
            job(initializing()),
            [pod(conditions=unscheduled("0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims."))],
            [event("PersistentVolumeClaim", "captune-data", "ProvisioningFailed", 'storageclass "nfs" not found')],
        ),
        'group train waits for the volumes captune-data: storageclass "nfs" not found',
    ),
    "a volume that cannot be mounted": (
        Look(job(initializing()), [pod()], [event("Pod", "p", "FailedMount", "mount.nfs: access denied")]),
        "group train waits for a volume: mount.nfs: access denied",
    ),
    "memory": (
        Look(
            job(initializing()),
            [
                pod(
                    phase="Failed",
                    containerStatuses=[container(state={"terminated": {"reason": "OOMKilled", "exitCode": 137}})],
                )
            ],
        ),
        "group train was killed because its memory was full (limit 24Gi)",
    ),
    "an operator that is not there": (
        Look(job({})),
        "KubeRay's operator has not taken notice of the job; `captune k8s doctor` says whether it runs",
    ),
    "a queue": (
        Look(
            job(
                {"jobDeploymentStatus": "Suspended"},
                spec={"suspend": True},
                labels={"kueue.x-k8s.io/queue-name": "captune"},
            ),
            workloads=[
                {
                    "metadata": {"ownerReferences": [{"kind": "RayJob", "name": "captune-mine-train"}]},
                    "status": {
                        "conditions": [
                            {"type": "QuotaReserved", "status": "False", "message": "insufficient unused quota"}
                        ]
                    },
                }
            ],
        ),
        "it waits in Kueue's queue captune: insufficient unused quota",
    ),
}


@pytest.mark.parametrize("about", CASES)
def test_every_cause_is_one_line_that_says_what_to_do(about: str) -> None:
    look, line = CASES[about]
    for found in (look.job, *look.pods, *look.events):
        assert schemas.errors(found) == []
    assert causes(look, KUBECTL) == [line]


def test_pods_that_only_start_are_no_cause() -> None:
    starting = pod(containerStatuses=[container(state={"waiting": {"reason": "ContainerCreating"}})])
    assert causes(Look(job(initializing()), [starting]), KUBECTL) == []


def test_two_pods_with_one_reason_are_one_line() -> None:
    alike = [pod(conditions=unscheduled("0/1 nodes are available: 1 Insufficient cpu.")) for _ in range(3)]
    assert len(causes(Look(job(initializing()), alike), KUBECTL)) == 1


@pytest.mark.parametrize("overlay", render.OVERLAYS)
def test_no_job_is_initializing_for_ever(overlay: str) -> None:
    """The deadline before a run counts one attempt, and a missed one is tried again: all together are two hours."""
    jobs = [
        found["spec"] for found in kustomize.build(render.FOLDER / "overlays" / overlay) if found["kind"] == "RayJob"
    ]
    assert {(job["backoffLimit"] + 1) * job["preRunningDeadlineSeconds"] for job in jobs} == {2 * 3600}
