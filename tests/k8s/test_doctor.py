"""`captune k8s doctor` against what a real API server answered: what is there, and what is missed when it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from k8s import nodes
from ray_jobs import cli
from tests.k8s.answers import Stage, answers, secret, storage_class

Object = dict[str, Any]


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    return answers(tmp_path, monkeypatch)


def examined(capsys: pytest.CaptureFixture[str], overlay: str = "kind", code: int = 1) -> dict[str, tuple[str, str]]:
    """What was looked at -> state, and what was said."""
    assert cli.main(["k8s", "doctor", "--overlay", overlay, "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    return {each["about"]: (each["state"], each["says"]) for each in found}


def test_a_cluster_that_has_everything(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    found = examined(capsys, code=0)
    assert {state for state, _ in found.values()} == {"ok"}
    assert found["API server"][1] == "Kubernetes 1.34.4"
    assert "kuberay-operator in namespace kuberay-system, quay.io/kuberay/operator:v1.7.0" in str(found)
    assert found["room for group cpu"][1] == "a pod asks for 2 CPUs, 5 GiB; node node1 has it"
    assert stage.order() == [], "a doctor changes nothing"


def test_everything_that_is_missing_is_said_at_once(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    """The recorded cluster without what a user makes, and a user with few rights."""
    stage.answer("namespace", [])
    stage.answer("secret", [secret("captune-redis", "pass")])
    stage.answer("storageclass", [])
    (operator,) = stage.recorded("deployment")
    operator["status"]["availableReplicas"] = 0
    stage.answer("deployment", [operator])
    some = {"verbs": ["get", "list"], "apiGroups": ["*"], "resources": ["*"]}
    (stage.home / "answers" / "rules.json").write_text(json.dumps({"resourceRules": [some]}))
    found = {about: says for about, (state, says) in examined(capsys).items() if state == "missing"}
    assert (
        "kubectl create namespace captune && kubectl label namespace captune pod-security" in found["namespace captune"]
    )
    assert "create secret generic captune-ray-token --from-literal=auth_token=" in found["secret captune-ray-token"]
    assert "lacks the key password" in found["secret captune-redis"]
    assert "no default storage class (there is none at all)" in found["volume captune-data"]
    assert "kubectl -n kuberay-system describe deployment" in found["KubeRay's operator"]
    assert (
        "you may not create rayjobs, patch rayjobs, delete rayjobs, create pods/exec, create pods"
        in found["your rights"]
    )


def test_kuberay_and_other_projects_by_the_kinds_that_they_bring(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    apis = json.loads((stage.home / "answers" / "apis.json").read_text())
    away = ("ray.io", "monitoring.coreos.com", "kueue.x-k8s.io")
    apis["groups"] = [group for group in apis["groups"] if group["name"] not in away]
    (stage.home / "answers" / "apis.json").write_text(json.dumps(apis))
    stage.answer("deployment", [])
    found = examined(capsys, "gpu-80gb-kueue")
    assert "helm upgrade --install kuberay-operator" in found["RayCluster, RayJob, RayService"][1]
    assert "install the Prometheus operator, or an overlay without" in found["PodMonitor, PrometheusRule"][1]
    assert "install Kueue" in found["LocalQueue"][1]
    assert found["KubeRay's operator"][0] == "missing"


def test_an_operator_that_the_network_policy_does_not_know(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    (operator,) = stage.recorded("deployment")
    operator["spec"]["template"]["metadata"]["labels"] = {"app": "ray"}
    stage.answer("deployment", [operator])
    assert "the operator's pods have (app=ray)" in examined(capsys)["network policy captune-operator"][1]


@pytest.mark.parametrize(
    ("provisioner", "state"),
    [("ebs.csi.aws.com", "missing"), ("nfs.csi.k8s.io", "ok"), ("csi.example.org", "unknown")],
)
def test_volumes_that_many_pods_write(
    stage: Stage, provisioner: str, state: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.answer(
        "storageclass", [storage_class("s", provisioner, {"storageclass.kubernetes.io/is-default-class": "true"})]
    )
    assert examined(capsys, "gpu-24gb")["volume captune-data"][0] == state


def test_cards_by_label_and_room_for_the_largest_pod(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    """The recorded node has a card's label of 24 GB, and two CPUs; a larger one beside it has everything."""
    small = examined(capsys, "gpu-24gb")
    assert small["room for the head"] == (
        "missing",
        "a pod asks for 4.2 CPUs, 32.5 GiB, and no node has as much cpu, memory; add a node or choose an overlay of "
        "smaller pods",
    )
    state, says = small["room for group train"]
    assert state == "unknown" and "a node autoscaler may bring one" in says
    (node,) = stage.recorded("node")
    large = json.loads(json.dumps(node))
    large["metadata"]["name"] = "node2"
    large["status"]["allocatable"] |= {"cpu": "64", "memory": "512Gi", "nvidia.com/gpu": "4"}
    stage.answer("node", [node, large])
    assert {state for about, (state, _) in examined(capsys, "gpu-24gb").items() if "room" in about} == {"ok"}
    found = examined(capsys, "gpu-80gb")["room for group train"]
    assert found[0] == "unknown" and "the label that it insists on (nvidia.com/gpu.memory)" in found[1]
    large["spec"]["taints"] = [{"key": "dedicated", "value": "others", "effect": "NoSchedule"}]
    stage.answer("node", [large])
    assert "tainted (dedicated)" in examined(capsys, "gpu-24gb")["room for group train"][1]


def test_what_others_use_is_no_room(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    busy = {"containers": [{"resources": {"requests": {"cpu": "1500m"}}}], "nodeName": "node1"}
    stage.answer("pod", [{"kind": "Pod", "metadata": {"name": "busy"}, "spec": busy}])
    state, says = examined(capsys, code=0)["room for group cpu"]
    assert state == "unknown" and "large enough, but others use it now" in says


def test_no_kubectl_and_no_api_server(
    stage: Stage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refused = "The connection to the server 10.0.0.1:6443 was refused - did you specify the right host or port?"
    (tmp_path / "bin" / "kubectl").write_text(f"#!/bin/sh\necho '{refused}' >&2; exit 1\n")
    found = examined(capsys)
    assert list(found) == ["API server"] and "does not answer: The connection to the server" in found["API server"][1]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "kubectl is not on the PATH" in examined(capsys)["API server"][1]


def test_what_one_may_not_look_at_is_said_and_stops_nothing(
    stage: Stage, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One kind of objects stops nothing; who may look at nothing at all has not been told that all is well."""
    kubectl = tmp_path / "bin" / "kubectl"
    kubectl.rename(tmp_path / "bin" / "all")
    told = 'Error from server (Forbidden): nodes is forbidden: User "u" cannot list resource "nodes"'
    kubectl.write_text(
        f'#!/bin/sh\ncase "$*" in *nodes*) echo \'{told}\' >&2; exit 1;; esac\nexec {tmp_path}/bin/all "$@"\n'
    )
    kubectl.chmod(0o755)
    state, says = examined(capsys, code=0)["room"]
    assert state == "unknown" and 'you may not look: kubectl get nodes: nodes is forbidden: User "u"' in says
    kubectl.write_text(
        kubectl.read_text().replace("*nodes*) echo", f'*/version*) exec {tmp_path}/bin/all "$@";; *) echo')
    )
    state, says = examined(capsys, code=1)["your rights"]
    assert state == "missing" and "you may look at nothing" in says


@pytest.mark.parametrize(
    ("requirement", "labels", "met"),
    [
        ({"key": "m", "operator": "Gt", "values": ["20000"]}, {"m": "24564"}, True),
        ({"key": "m", "operator": "Gt", "values": ["20000"]}, {}, False),
        ({"key": "m", "operator": "Lt", "values": ["20000"]}, {"m": "1"}, True),
        ({"key": "m", "operator": "NotIn", "values": ["spot"]}, {}, True),
        ({"key": "m", "operator": "In", "values": ["spot"]}, {"m": "spot"}, True),
        ({"key": "m", "operator": "Exists"}, {}, False),
        ({"key": "m", "operator": "DoesNotExist"}, {}, True),
    ],
)
def test_requirements_of_labels(requirement: Object, labels: Object, met: bool) -> None:
    assert nodes.matches(requirement, labels) is met


@pytest.mark.parametrize("says", ["echo hello", "true", "echo null", "echo '[]'", "echo '{}'", "sleep 9"])
def test_a_kubectl_that_answers_oddly_is_named_in_one_sentence(
    says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a wrapper, a proxy or a login page does; or one that does not answer at all."""
    (tmp_path / "kubectl").write_text(f"#!/bin/sh\n{says}\n")
    (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr("k8s.kubectl._PATIENCE_S", 1.0)
    assert cli.main(["k8s", "doctor", "--overlay", "kind"]) == 1
    said = capsys.readouterr()
    assert "kubectl get --raw /version " in said.out + said.err
