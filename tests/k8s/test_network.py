"""Who may talk to whom: what Ray, the operator and the autoscaler need is open, everything else is closed."""

from __future__ import annotations

from functools import cache

import pytest

from k8s import kustomize, render
from tests.k8s.traffic import Peer, allowed


def ray(kind: str, **labels: str) -> Peer:
    """A pod as KubeRay labels it (`labelPod` in its common/pod.go)."""
    return Peer({"ray.io/is-ray-node": "yes", "ray.io/node-type": kind, "ray.io/cluster": "captune-run-x7k2p"} | labels)


HEAD, WORKER, CLEANER = ray("head"), ray("worker"), ray("redis-cleanup")
ENDPOINT = ray("worker", **{"ray.io/serve": "true"})
REDIS = Peer({"app.kubernetes.io/name": "captune-redis"})
SUBMITTER = Peer({"app.kubernetes.io/component": "submitter", "ray.io/originated-from-crd": "RayJob"})
OPERATOR = Peer({"app.kubernetes.io/name": "kuberay-operator"}, namespace="kuberay-system")
KUSTOMIZED = Peer(
    {"app.kubernetes.io/name": "kuberay", "app.kubernetes.io/component": "kuberay-operator"}, namespace="ray-system"
)
DNS = Peer({"k8s-app": "kube-dns"}, namespace="kube-system")
GATEWAY = Peer({}, namespace="edge", namespace_labels={"captune.dev/gateway": "true"})
PROMETHEUS = Peer({"app.kubernetes.io/name": "prometheus"}, namespace="monitoring")
STRANGER, NEIGHBOUR = Peer({}, namespace="elsewhere"), Peer({"app": "notebook"})
API_SERVER, INTERNET, METADATA = Peer(address="10.96.0.1"), Peer(address="203.0.113.9"), Peer(address="169.254.169.254")

OPEN = [
    (WORKER, HEAD, 6379, "workers register with the head"),
    (HEAD, WORKER, 40123, "the head reaches workers on ports Ray chooses"),
    (WORKER, WORKER, 40124, "objects travel between workers"),
    (OPERATOR, HEAD, 8265, "the operator asks for a job's state"),
    (KUSTOMIZED, HEAD, 8265, "one that Kustomize installed is labelled otherwise"),
    (OPERATOR, HEAD, 8000, "and whether a head's proxy lives"),
    (SUBMITTER, HEAD, 8265, "a job is submitted"),
    (HEAD, API_SERVER, 443, "the autoscaler asks for workers, by the service's address"),
    (HEAD, API_SERVER, 6443, "or by the server's own"),
    (HEAD, REDIS, 6379, "tables outlive a head"),
    (CLEANER, REDIS, 6379, "and are cleaned up after a cluster"),
    (GATEWAY, ENDPOINT, 8000, "questions come through the gateway"),
    (HEAD, DNS, 53, "names"),
    (SUBMITTER, DNS, 53, "names"),
]
CLOSED = [
    (STRANGER, HEAD, 8265, "the job API runs code"),
    (STRANGER, HEAD, 6379, "the head's tables"),
    (STRANGER, HEAD, 10001, "Ray Client runs code, too"),
    (NEIGHBOUR, HEAD, 8265, "not even from the same namespace"),
    (STRANGER, ENDPOINT, 8000, "the endpoint has no token: its gateway has"),
    (GATEWAY, HEAD, 8265, "the gateway gets answers, not the job API"),
    (GATEWAY, WORKER, 8000, "and only from the endpoint"),
    (WORKER, API_SERVER, 443, "only the autoscaler talks to the Kubernetes API"),
    (WORKER, INTERNET, 443, "weights and data come from volumes"),
    (WORKER, REDIS, 6379, "workers have no business with the tables"),
    (STRANGER, REDIS, 6379, "nor has anybody else"),
    (HEAD, METADATA, 443, "a cloud's credentials"),
    (SUBMITTER, HEAD, 6379, "a submitter talks to the job API alone"),
    (SUBMITTER, INTERNET, 443, "a submitter talks to the job API alone"),
    (OPERATOR, REDIS, 6379, "the operator has no business with the tables"),
]


@cache
def policies(overlay: str) -> list[dict]:
    return [
        found for found in kustomize.build(render.FOLDER / "overlays" / overlay) if found["kind"] == "NetworkPolicy"
    ]


@pytest.mark.parametrize(
    ("source", "target", "port", "why"), OPEN, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_ray_needs_is_open(source: Peer, target: Peer, port: int, why: str) -> None:
    protocol = "UDP" if port == 53 else "TCP"
    assert allowed(policies("kind"), source, target, port, protocol), why


@pytest.mark.parametrize(
    ("source", "target", "port", "why"), CLOSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_everything_else_is_closed(source: Peer, target: Peer, port: int, why: str) -> None:
    assert not allowed(policies("gpu-80gb"), source, target, port), why


def test_prometheus_comes_in_only_where_monitoring_is_part_of_the_overlay() -> None:
    for port in (8080, 44217, 44227):
        assert allowed(policies("gpu-24gb"), PROMETHEUS, HEAD, port)
    assert not allowed(policies("kind"), PROMETHEUS, HEAD, 8080)
    assert not allowed(policies("gpu-24gb"), PROMETHEUS, HEAD, 8265)


def test_without_the_rule_for_the_operator_it_would_be_locked_out() -> None:
    """The table above can fail."""
    without = [policy for policy in policies("kind") if policy["metadata"]["name"] != "captune-operator"]
    assert not allowed(without, OPERATOR, HEAD, 8265)
