"""Kubernetes manifests for one recipe: an overlay, with the recipe's text, commands and numbers in it."""

from __future__ import annotations

import json
import os
import re
import shlex
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from k8s import kustomize, names, needs
from k8s.names import DATA, WORKLOADS
from pipelines.errors import UserError
from pipelines.groups import LABEL
from pipelines.rundir import RECIPE, RunDir
from pipelines.storage import is_remote
from ray_jobs import hallway
from ray_jobs.recipe import RECIPES, Recipe, paths, recipe_yaml
from ray_jobs.recipe_file import digest
from serve import front
from serve.config import ServeConfig

FOLDER = Path(__file__).parent
OVERLAYS = tuple(sorted(path.parent.name for path in FOLDER.glob("overlays/*/kustomization.yaml")))
MOUNTED = (DATA, "/models", "/bucket", "/etc/captune")
RECIPE_FILE = f"/etc/captune/{RECIPE}"
DIGEST, RUN, WORK = "captune.dev/recipe", "captune.dev/run", "captune.dev/work"
"""What runs has the digest of its recipe as an annotation, and its pods have the run and the workload as labels."""
_GRACE_S = 2.0
"""Serve's proxy gives up so much later than a replica (serve/app.py), so that the client gets the replica's error
body."""
_START_TRIES = 1000
"""Of a replica whose model is not there yet, a minute apart; KubeRay gives the endpoint up before."""
_WORK = ("RayJob", "RayCluster", "RayService")
_SMALL = {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"memory": "4Gi"}}
"""Of the pod that looks at everything and computes nothing."""

Object = dict[str, Any]


class Step(NamedTuple):
    """A job of a stage: arguments of `render`."""

    workload: str
    arm: str = ""
    seed: int | None = None


def stages(recipe: Recipe) -> list[Step]:
    """The jobs that together do what the workload `run` does, in their order; one makes all caption sets."""
    return list(dict.fromkeys(Step(step.stage, step.arm, step.seed) for step in hallway.steps(recipe)))


def render(
    recipe: Recipe, overlay: str, workload: str = "run", arm: str = "", seed: int | None = None, image: str = ""
) -> list[Object]:
    """Everything that has to be applied for `workload`: what all of them share, and the one RayJob, RayCluster,
    RayService or Job, let go. The recipe's ConfigMap is named by its content and what runs by the run, so that what is
    rendered for other recipes, arms and stages stays as it is.

    Args:
        overlay: a directory of k8s/overlays.
        workload: run (the whole recipe), one stage, preflight (looks at everything that a run needs, on one CPU pod),
            cluster (for `ray job submit`) or serve.
        arm: of the stages that an arm has its own of, and of serve. Empty: all of them, one after another; for serve
            the last one in the recipe that is no control.
        seed: of training and what follows. None: all of them; for serve the first.
        image: instead of captune:VERSION; REPOSITORY:TAG, or better REPOSITORY@sha256:DIGEST.

    Raises:
        UserError: the recipe does not fit the overlay, or names what pods cannot see.
    """
    if overlay not in OVERLAYS:
        raise UserError(f"--overlay {overlay}: no such overlay (there are {', '.join(OVERLAYS)})")
    if workload not in WORKLOADS:
        raise UserError(f"--workload {workload}: must be one of {', '.join(WORKLOADS)}")
    step = _checked(recipe, Step(workload, arm, seed))
    objects, files = json.loads(_built(overlay)), texts(recipe)
    serving, chosen = most_replicas(objects), _chosen(objects, workload)
    shared = [
        found for found in objects if found["kind"] not in (*_WORK, *(["HTTPRoute"] if workload != "serve" else []))
    ]
    fill([*shared, chosen], recipe, serving, step)
    if workload == "preflight":
        chosen = _on_one_pod(chosen)
    _call(shared, chosen, recipe, step, digest(files))
    objects = [*shared, chosen]
    if workload == "serve":
        objects += budget(chosen, recipe)
    if image:
        _set_image(objects, image)
    return objects


@cache
def _built(overlay: str) -> str:
    """An overlay's objects as JSON: whoever reads it has objects of his own."""
    return json.dumps(kustomize.build(FOLDER / "overlays" / overlay))


def fill(objects: list[Object], recipe: Recipe, serving: int, step: Step) -> None:
    """Put a recipe's text and numbers into an overlay's objects; the endpoint may scale to `serving` replicas."""
    for found in objects:
        if found["kind"] == "ConfigMap" and found["metadata"]["name"] == "captune-recipe":
            found["data"] = texts(recipe)
        if found["kind"] in _WORK:
            surge = _surge(recipe, serving) if found["kind"] == "RayService" else 0
            needs.fit(cluster_spec(found), recipe, serving + surge)
        if found["kind"] in ("RayJob", "RayCluster"):  # changed labels would replace the endpoint's whole cluster
            needs.describe(cluster_spec(found))
        if found["kind"] == "RayService":
            found["spec"]["serveConfigV2"] = _yaml(serve_config(recipe, step.arm, step.seed, serving))
            _guard(cluster_spec(found), recipe)


def _guard(cluster: Object, recipe: Recipe) -> None:
    """Tell the endpoint's proxies, which start with Ray and not with the application, what stands in front of them,
    where it is another than the overlay's.
    """
    settings = front.environment(recipe.serve)[front.SETTINGS]
    if settings == front.environment(ServeConfig())[front.SETTINGS]:
        return
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        ray = group["template"]["spec"]["containers"][0]
        ray["env"] = [*ray.get("env", []), {"name": front.SETTINGS, "value": settings}]


def cluster_spec(found: Object) -> Object:
    """The RayCluster spec inside a RayCluster, RayJob or RayService."""
    spec: Object = found["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def texts(recipe: Recipe) -> dict[str, str]:
    """Files of the ConfigMap below /etc/captune: the resolved recipe, and the user's own Data-Juicer recipes beside it.

    Raises:
        UserError: a key names an absolute path that no pod mounts, or a Data-Juicer recipe that is not there.
    """
    for key, path in paths(recipe).items():
        if key.endswith(".recipe"):
            continue  # a Data-Juicer recipe travels with this one
        where = os.path.normpath(_absolute(path))
        if not is_remote(path) and not where.startswith(tuple(f"{place}/" for place in MOUNTED)):
            raise UserError(
                f"{key}: {path} is on this machine, not in the cluster. Pods see what lies below {DATA} (relative "
                f"paths count from there) and /models"
            )
    if is_remote(recipe.run_dir):
        raise UserError(f"run_dir: {recipe.run_dir}: a run appends and renames, which object stores cannot")
    files: dict[str, str] = {}
    shipped = yaml.safe_load(recipe_yaml(recipe))
    for config in (shipped["refine"], *shipped["arms"].values()):
        if config["recipe"] is None:
            continue
        file = Path(config["recipe"])
        if file.parent == RECIPES:
            config["recipe"] = file.name
        elif not file.is_file():
            raise UserError(f"{file}: no such Data-Juicer recipe")
        else:
            files[file.name] = file.read_text()
            config["recipe"] = f"/etc/captune/{file.name}"
    return {RECIPE: yaml.safe_dump(shipped, sort_keys=False, allow_unicode=True), **files}


def entrypoint(step: Step, recipe: str = "", log: Path | None = None) -> list[str]:
    """The command of a job, which refuses a recipe of another digest and keeps its log where no pod's end reaches."""
    words = ["captune", "run", RECIPE_FILE]
    if step.workload == "preflight":
        words.append("--preflight")
    elif step.workload != "run":
        words += hallway.Step(step.workload, step.arm, step.seed).words
    words += ["--recipe-is", recipe] if recipe else []
    return [*words, "--log", str(log)] if log else words


def serve_config(recipe: Recipe, arm: str, seed: int | None, serving: int) -> Object:
    """`serveConfigV2` of the endpoint for an arm's merged model; a busy replica has a full batch and the next one in
    hand.
    """
    config = recipe.serve
    if config.tls_certificate:
        raise UserError("serve.tls_certificate: on a cluster the gateway in front of the endpoint terminates TLS")
    changed = {
        f.name: getattr(config, f.name)
        for f in fields(config)
        if getattr(config, f.name) != getattr(ServeConfig(), f.name)
    }
    scaling = {
        "min_replicas": config.replicas,
        "max_replicas": max(serving, config.replicas),
        "target_ongoing_requests": config.max_batch_size,
    }
    model = (
        RunDir(Path(recipe.run_dir), tuple(recipe.seeds))
        .walk(arm, recipe.seeds[0] if seed is None else seed)
        .merged.directory
    )
    application = {
        "name": "captune",
        "import_path": "serve.app:build",
        "route_prefix": "/",
        "args": {"model": _absolute(str(model)), "config": changed, "start_tries": _START_TRIES},
        "deployments": [
            {
                "name": "Captune",
                "num_replicas": "auto",
                "max_surge_percent": 100 * _surge(recipe, serving) // serving,  # one, at any number of replicas
                "autoscaling_config": scaling,
            }
        ],
    }
    http = {"host": "0.0.0.0", "port": 8000, "request_timeout_s": config.request_timeout_s + _GRACE_S}
    return {"proxy_location": "EveryNode", "http_options": http, "applications": [application]}


def _surge(recipe: Recipe, serving: int) -> int:
    """Replicas of a changed model that start before one of the old stops: one, where the overlay lets the endpoint
    grow at all, because one that finds no room would wait for ever.
    """
    return int(serving > recipe.serve.replicas)


def budget(service: Object, recipe: Recipe) -> list[Object]:
    """Nodes may be drained while all but one of the endpoint's least pods stay; nothing where one pod is the least.

    In whole pods: Kubernetes cannot compute `maxUnavailable` for pods whose owner, a RayCluster, has no scale, and then
    allows no disruption at all, so that a drain waits for ever.
    """
    (group,) = (each for each in cluster_spec(service)["workerGroupSpecs"] if each["groupName"] == "serve")
    least = needs.pods(recipe.serve.demand(), needs.offered(group))
    if least < 2:
        return []
    about = {key: service["metadata"][key] for key in ("name", "namespace", "labels") if key in service["metadata"]}
    spec = {"minAvailable": least - 1, "selector": {"matchLabels": {LABEL: "serve", WORK: about["name"]}}}
    return [{"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": about, "spec": spec}]


def to_yaml(objects: list[Object]) -> str:
    """One file of several documents, texts of several lines as such."""
    return "---\n".join(_yaml(found) for found in objects)


def most_replicas(objects: list[Object]) -> int:
    """How far the overlay lets the endpoint scale."""
    service = next(found for found in objects if found["kind"] == "RayService")
    deployment = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["deployments"][0]
    return int(deployment["autoscaling_config"]["max_replicas"])


def _checked(recipe: Recipe, step: Step) -> Step:
    """The same, once the recipe has it; of an endpoint, arm and seed are said."""
    workload, arm, seed = step
    if not recipe.arms and workload in ("run", "serve"):
        raise UserError(f"--workload {workload} needs a recipe with arms")
    if workload == "serve":
        merged = hallway.steps(recipe, "merge", arm, seed)
        last = next((step for step in reversed(merged) if recipe.has_data(step.arm)), merged[-1])
        return Step("serve", last.arm, merged[0].seed)
    hallway.steps(recipe, workload if workload in hallway.STAGES else "", arm, seed)
    return step


def _chosen(objects: list[Object], workload: str) -> Object:
    """The overlay's own object for a workload."""
    kind, name = {"serve": ("RayService", "captune-serve")}.get(workload, ("RayJob", f"captune-{workload}"))
    if workload in ("cluster", "preflight"):
        kind, name = "RayCluster", "captune"
    return next(found for found in objects if found["kind"] == kind and found["metadata"]["name"] == name)


def _on_one_pod(cluster: Object) -> Object:
    """A Job with the pod of a cluster's group `cpu`, made small, and nothing of Ray."""
    (group,) = (each for each in cluster_spec(cluster)["workerGroupSpecs"] if each["groupName"] == "cpu")
    template = group["template"]
    pod = template["spec"]
    (container,) = pod["containers"]
    container |= {"name": "preflight", "resources": _SMALL}
    del container["ports"]
    container["volumeMounts"] = [mount for mount in container["volumeMounts"] if mount["name"] != "shm"]
    pod["volumes"] = [volume for volume in pod["volumes"] if volume["name"] != "shm"]
    pod["restartPolicy"] = "Never"
    template["metadata"]["labels"][LABEL] = "preflight"
    # What it finds would be found again; it goes with its log after a day.
    spec = {"backoffLimit": 0, "activeDeadlineSeconds": 3600, "ttlSecondsAfterFinished": 86400, "template": template}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": cluster["metadata"], "spec": spec}


def _call(shared: list[Object], chosen: Object, recipe: Recipe, step: Step, mark: str) -> None:
    """Give what runs its name, labels, command and recipe, and let it go."""
    name, run = names.of_work(recipe.run_dir, *step), names.of_run(recipe.run_dir)
    labels = {RUN: run, WORK: name}
    for found in shared:
        if found["kind"] == "ConfigMap" and found["metadata"]["name"] == "captune-recipe":
            found["metadata"] |= {"name": names.of_recipe(mark)}
            found["immutable"] = True
        if found["kind"] == "HTTPRoute":
            found["metadata"]["name"] = name
            for rule in found["spec"]["rules"]:
                for backend in rule["backendRefs"]:
                    backend["name"] = f"{name}-serve-svc"
    chosen["metadata"]["name"] = name
    chosen["metadata"]["labels"] |= labels
    chosen["metadata"].setdefault("annotations", {})[DIGEST] = mark
    for template in _pod_templates(chosen):
        template["metadata"]["labels"] |= labels
        for volume in template["spec"]["volumes"]:
            if volume.get("configMap", {}).get("name") == "captune-recipe":
                volume["configMap"]["name"] = names.of_recipe(mark)
    if chosen["kind"] == "RayJob":
        log = RunDir(Path(recipe.run_dir)).log(name)
        chosen["spec"]["entrypoint"] = shlex.join(entrypoint(step, mark, log))
    if chosen["kind"] == "Job":
        chosen["spec"]["template"]["spec"]["containers"][0]["command"] = entrypoint(step, mark)
    else:
        chosen["spec"]["suspend"] = False


def _pod_templates(found: Object) -> list[Object]:
    spec = found["spec"]
    if found["kind"] == "Job":
        return [spec["template"]]
    cluster = cluster_spec(found)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    submitter = [spec["submitterPodTemplate"]] if found["kind"] == "RayJob" else []
    return [*(group["template"] for group in groups), *submitter]


_IMAGE = re.compile(r"[\w.-]+(:\d+)?(/[\w.-]+)*(:[\w.-]{1,128})?(@sha256:[0-9a-f]{64})?")


def _set_image(objects: list[Object], image: str) -> None:
    name, _, digest = image.partition("@")
    repository, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:  # no tag, but perhaps a registry's port
        repository, tag = name, ""
    if not _IMAGE.fullmatch(image):
        raise UserError(f"--image {image}: is not REPOSITORY:TAG or REPOSITORY@sha256:DIGEST")
    if not digest and tag in ("", "latest"):
        raise UserError(f"--image {image}: name a version or, better, a digest; `latest` is another image tomorrow")
    kustomize.set_image(objects, "captune", newName=repository, newTag=tag, digest=digest)


def _absolute(path: str) -> str:
    return path if path.startswith("/") else f"{DATA}/{path}"


_NO_TEXT_ELSEWHERE = re.compile(r"[-+.]?\d[\w.+-]*|[yn]|yes|no|on|off|true|false|null|~", re.IGNORECASE)
"""What Kubernetes' reader of YAML may take for a number or a truth value where Python's takes it for text: 1e5, 0o17,
y.
"""


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Texts of several lines as blocks; nothing as an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        """Every value stands where it is used."""
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else "'" if _NO_TEXT_ELSEWHERE.fullmatch(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def _yaml(value: Object) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=140)
