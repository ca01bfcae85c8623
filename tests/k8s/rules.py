"""What KubeRay's operator refuses beyond its CRDs: `ray-operator/controllers/ray/utils/validation.go` of v1.7.0, as far
as these manifests can meet it, with the feature gates as they are by default.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

LONGEST_NAME = {"RayCluster": 53, "RayJob": 47, "RayService": 47}
_LABEL_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_RESOURCE_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")


def violations(found: dict[str, Any]) -> list[str]:
    """The operator's complaints about a RayCluster, RayJob or RayService."""
    kind, name, spec = found["kind"], found["metadata"]["name"], found["spec"]
    said = []
    if len(name) > LONGEST_NAME[kind]:
        said.append(f"name should be no more than {LONGEST_NAME[kind]} characters")
    if not _LABEL_1035.fullmatch(name):
        said.append("name should be a valid DNS1035 label")
    if kind == "RayJob":
        said += _job(spec)
    if kind == "RayService":
        said += _service(found)
    cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    said += _cluster(cluster, kind)
    return [f"{kind} {name}: {text}" for text in said]


def _cluster(spec: dict[str, Any], kind: str) -> list[str]:
    said = []
    head, workers = spec["headGroupSpec"], spec.get("workerGroupSpecs", [])
    autoscaling = bool(spec.get("enableInTreeAutoscaling"))
    v2 = autoscaling and spec.get("autoscalerOptions", {}).get("version") == "v2"
    for group in (head, *workers):
        name, params = group.get("groupName", "Head"), group.get("rayStartParams", {})
        if not group["template"]["spec"].get("containers"):
            said.append(f"{name} should have at least one container")
        if any(params.get(key) for key in _RESOURCE_PARAMS) and group.get("resources"):
            said.append(f"resource fields should not be set in both rayStartParams and Resources for {name}")
        if "labels" in params:
            said.append(f"rayStartParams['labels'] is not supported for {name}")
        if any(not isinstance(value, str) for value in params.values()):
            said.append(f"rayStartParams of {name} must be strings")
        if v2 and group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            said.append(f"restartPolicy for {name} should be Never or unset when using autoscaler V2")
    for group in workers:
        said += _group(group, autoscaling, v2, spec.get("rayVersion", ""))
    if len({group["groupName"] for group in workers}) != len(workers):
        said.append("two worker groups have the same name")
    said += _recovery(spec, head)
    environment = {entry["name"] for entry in head["template"]["spec"]["containers"][0].get("env", [])}
    if "RAY_enable_autoscaler_v2" in environment:
        said.append("autoscalerOptions.version says it; RAY_enable_autoscaler_v2 must not")
    auth = spec.get("authOptions", {})
    if auth.get("mode") == "token" and _version(spec.get("rayVersion", "")) < (2, 52):
        said.append("authOptions.mode is 'token' but rayVersion is not 2.52.0 or later")
    said += [
        f"spec.{key} requires a feature gate that is off"
        for key in ("networkPolicy", "tlsOptions", "historyServerOptions")
        if key in spec
    ]
    if kind != "RayCluster" and "upgradeStrategy" in spec:
        said.append(f"upgradeStrategy cannot be set when RayCluster is created by {kind}")
    return said


def _group(group: dict[str, Any], autoscaling: bool, v2: bool, version: str) -> list[str]:
    said, name = [], group["groupName"]
    least, most = group.get("minReplicas"), group.get("maxReplicas")
    if not autoscaling and (least is None or most is None):
        said.append(f"worker group {name} must set both minReplicas and maxReplicas when autoscaling is disabled")
    if min(least or 0, most or 0) < 0 or (least is not None and most is not None and least > most):
        said.append(f"worker group {name} has minReplicas {least} greater than maxReplicas {most}")
    if "idleTimeoutSeconds" in group and not v2:
        said.append(f"worker group {name}: idleTimeoutSeconds is set, but autoscaler v2 is not enabled")
    if group.get("priority") and (not v2 or _version(version) < (2, 56)):
        said.append(f"worker group {name}: priority needs autoscaler v2 and Ray 2.56")
    if group.get("suspend"):
        said.append(f"worker group {name} cannot be suspended")
    return said


def _recovery(spec: dict[str, Any], head: dict[str, Any]) -> list[str]:
    environment = {entry["name"] for entry in head["template"]["spec"]["containers"][0].get("env", [])}
    said = [
        f"{name} is KubeRay's to set"
        for name in ("RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME")
        if name in environment
    ]
    options = spec.get("gcsFaultToleranceOptions")
    if options is None:
        return said
    if {"redis-password", "redis-username"} & set(head.get("rayStartParams", {})):
        said.append("use gcsFaultToleranceOptions.redisPassword, not rayStartParams")
    if options.get("backend", "redis") == "redis" and "storage" in options:
        said.append("gcsFaultToleranceOptions.storage is for another backend")
    return said


def _job(spec: dict[str, Any]) -> list[str]:
    said = []
    mode = spec.get("submissionMode", "K8sJobMode")
    if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
        said.append("shutdownAfterJobFinishes false is not allowed to be suspended")
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not spec.get("shutdownAfterJobFinishes"):
        said.append("shutdownAfterJobFinishes false cannot have ttlSecondsAfterFinished")
    if "clusterSelector" in spec and (spec.get("backoffLimit") or spec.get("suspend") or mode == "SidecarMode"):
        said.append("clusterSelector excludes backoffLimit, suspend and SidecarMode")
    if "rayClusterSpec" not in spec and "clusterSelector" not in spec:
        said.append("one of rayClusterSpec or clusterSelector must be set")
    if mode == "SidecarMode" and {"submitterPodTemplate", "submitterConfig"} & set(spec):
        said.append("SidecarMode doesn't support submitterPodTemplate or submitterConfig")
    if mode == "InteractiveMode" and spec.get("backoffLimit"):
        said.append("backoffLimit is incompatible with InteractiveMode")
    if "deletionStrategy" in spec:
        said.append("deletionStrategy requires a feature gate, and excludes shutdownAfterJobFinishes")
    for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(key, 1) <= 0:
            said.append(f"{key} must be a positive integer")
    if spec.get("backoffLimit", 0) < 0:
        said.append("backoffLimit must not be negative")
    if not isinstance(yaml.safe_load(spec.get("runtimeEnvYAML", "{}")), dict):
        said.append("runtimeEnvYAML is no YAML mapping")
    return said


def _service(found: dict[str, Any]) -> list[str]:
    said, spec = [], found["spec"]
    timeout = found["metadata"].get("annotations", {}).get("ray.io/initializing-timeout", "1m")
    if not re.fullmatch(r"([1-9]\d*(\.\d+)?(h|m|s|ms))+|[1-9]\d*", timeout):
        said.append("ray.io/initializing-timeout must be a positive duration")
    if spec["rayClusterConfig"]["headGroupSpec"].get("headService", {}).get("metadata", {}).get("name"):
        said.append("headService.metadata.name should not be set")
    strategy = spec.get("upgradeStrategy", {}).get("type")
    if strategy not in (None, "None", "NewCluster", "NewClusterWithIncrementalUpgrade"):
        said.append(f"upgradeStrategy.type value {strategy} is invalid")
    if strategy == "NewClusterWithIncrementalUpgrade" and "clusterUpgradeOptions" not in spec["upgradeStrategy"]:
        said.append("clusterUpgradeOptions are required for NewClusterWithIncrementalUpgrade")
    return said


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2]) if text else (0,)
