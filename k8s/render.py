"""Kubernetes manifests for one recipe: an overlay, with the recipe's text, commands and numbers in it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from k8s import kustomize, needs
from pipelines.errors import UserError
from pipelines.rundir import RECIPE, RunDir
from ray_jobs.recipe import RECIPES, Recipe, paths, recipe_yaml
from serve.config import ServeConfig

FOLDER = Path(__file__).parent
OVERLAYS = tuple(sorted(path.parent.name for path in FOLDER.glob("overlays/*/kustomization.yaml")))
STAGES = ("caption", "refine", "train", "merge", "evaluate", "compare")
WORKLOADS = ("run", *STAGES, "cluster", "serve")
OF_AN_ARM = ("refine", "train", "merge", "evaluate", "serve")
DATA, MOUNTED = "/data", ("/data", "/models", "/bucket", "/etc/captune")
RECIPE_FILE = f"/etc/captune/{RECIPE}"
_GRACE_S = 2.0
"""Serve's proxy gives up so much later than a replica (serve/app.py), so that the client gets the replica's error
body."""
_START_TRIES = 1000
"""Of a replica whose model is not there yet, a minute apart; KubeRay gives the endpoint up before."""
_WORK = ("RayJob", "RayCluster", "RayService")

Object = dict[str, Any]


def render(recipe: Recipe, overlay: str, workload: str = "run", arm: str = "", image: str = "") -> list[Object]:
    """Everything that has to be applied for `workload`: what all of them share, and the one RayJob, RayCluster or
    RayService, let go.

    Args:
        overlay: a directory of k8s/overlays.
        workload: run (the whole recipe), one stage, cluster (for `ray job submit`) or serve.
        arm: of the stages that an arm has its own of; the last one in the recipe when empty.
        image: instead of captune:VERSION; REPOSITORY:TAG, or better REPOSITORY@sha256:DIGEST.

    Raises:
        UserError: the recipe does not fit the overlay, or names what pods cannot see.
    """
    if overlay not in OVERLAYS:
        raise UserError(f"--overlay {overlay}: no such overlay (there are {', '.join(OVERLAYS)})")
    if workload not in WORKLOADS:
        raise UserError(f"--workload {workload}: must be one of {', '.join(WORKLOADS)}")
    arm = _arm(recipe, workload, arm)
    objects = kustomize.build(FOLDER / "overlays" / overlay)
    serving = most_replicas(objects)
    chosen = _chosen(objects, workload)
    objects = [found for found in objects if found["kind"] not in _WORK or found is chosen]
    fill(objects, recipe, arm, serving)
    if arm and workload in OF_AN_ARM and workload != "serve":
        chosen["metadata"]["name"] = _named(f"captune-{workload}-{arm}")
    chosen["spec"]["suspend"] = False
    if workload == "serve":
        objects += budget(chosen, recipe)
    if image:
        _set_image(objects, image)
    return objects


def fill(objects: list[Object], recipe: Recipe, arm: str, serving: int) -> None:
    """Put a recipe's text, commands and numbers into an overlay's objects; the endpoint may scale to `serving`
    replicas.
    """
    for found in objects:
        if found["kind"] == "ConfigMap" and found["metadata"]["name"] == "captune-recipe":
            found["data"] = texts(recipe)
        if found["kind"] in _WORK:
            surge = _surge(recipe, serving) if found["kind"] == "RayService" else 0
            needs.fit(cluster_spec(found), recipe, serving + surge)
        if found["kind"] in ("RayJob", "RayCluster"):  # changed labels would replace the endpoint's whole cluster
            needs.describe(cluster_spec(found))
        if found["kind"] == "RayJob":
            found["spec"]["entrypoint"] = entrypoint(recipe, found["metadata"]["name"].removeprefix("captune-"), arm)
        if found["kind"] == "RayService":
            found["spec"]["serveConfigV2"] = _yaml(serve_config(recipe, arm, serving))


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
        if path.startswith("/") and not path.startswith(tuple(f"{place}/" for place in MOUNTED)):
            raise UserError(
                f"{key}: {path} is on this machine, not in the cluster. Pods see {DATA} (relative paths count "
                f"from there) and /models"
            )
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


def entrypoint(recipe: Recipe, stage: str, arm: str) -> str:
    """The command of a job: the whole recipe, or one stage of it with the files that the whole would read and write."""
    if stage == "run":
        return f"captune run {RECIPE_FILE}"
    if len(recipe.seeds) > 1 and stage not in ("caption", "refine"):
        raise UserError(f"seeds: {len(recipe.seeds)} of them; only the workload `run` walks through several")
    place, seed, bench = RunDir(Path(recipe.run_dir)), recipe.seeds[0], recipe.evaluate.benchmark
    walk = place.walk(arm, seed)
    adapter, merged = walk.adapter.directory, walk.merged.directory
    words = {
        "caption": ["--output", place.captions],
        "refine": ["--input", place.captions, "--output", place.dataset(arm), *_refine_options(recipe, arm)],
        "train": ["--input", place.dataset(arm), "--output", adapter, *_train_options(recipe, arm)],
        "merge": ["--adapter", adapter, "--output", merged],
        "evaluate": ["--model", merged, "--output", walk.evaluation(bench).directory],
        "compare": [
            *(place.walk(name, seed).evaluation(bench).directory for name in recipe.arms),
            "--output",
            place.comparing(seed),
        ],
    }[stage]
    return shlex.join(["captune", stage, "--config", RECIPE_FILE, *map(str, words)])


def serve_config(recipe: Recipe, arm: str, serving: int) -> Object:
    """`serveConfigV2` of the endpoint for an arm's merged model; a busy replica has a full batch and the next one in
    hand.
    """
    config = recipe.serve
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
    model = RunDir(Path(recipe.run_dir), tuple(recipe.seeds)).walk(arm, recipe.seeds[0]).merged.directory
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
    spec = {"minAvailable": least - 1, "selector": {"matchLabels": {"captune.dev/group": "serve"}}}
    return [{"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": about, "spec": spec}]


def to_yaml(objects: list[Object]) -> str:
    """One file of several documents, texts of several lines as such."""
    return "---\n".join(_yaml(found) for found in objects)


def _arm(recipe: Recipe, workload: str, arm: str) -> str:
    if arm and arm not in recipe.arms:
        raise UserError(f"--arm {arm}: the recipe's arms are {', '.join(recipe.arms) or 'none'}")
    if not recipe.arms and workload in ("run", "compare", *OF_AN_ARM):
        raise UserError(f"--workload {workload} needs a recipe with arms")
    return arm or next(reversed(recipe.arms), "")


def most_replicas(objects: list[Object]) -> int:
    """How far the overlay lets the endpoint scale."""
    service = next(found for found in objects if found["kind"] == "RayService")
    deployment = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["deployments"][0]
    return int(deployment["autoscaling_config"]["max_replicas"])


def _chosen(objects: list[Object], workload: str) -> Object:
    kind, name = {"cluster": ("RayCluster", "captune"), "serve": ("RayService", "captune-serve")}.get(
        workload, ("RayJob", f"captune-{workload}")
    )
    return next(found for found in objects if found["kind"] == kind and found["metadata"]["name"] == name)


def _named(name: str) -> str:
    """A RayJob's name: KubeRay allows 47 characters and wants a DNS label."""
    label = name.lower().replace("_", "-").rstrip("-")
    if len(label) > 47:
        raise UserError(f"{name}: longer than the 47 characters that KubeRay allows; shorten the arm's name")
    return label


def _set_image(objects: list[Object], image: str) -> None:
    name, _, digest = image.partition("@")
    repository, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:  # no tag, but perhaps a registry's port
        repository, tag = name, ""
    if not digest and tag in ("", "latest"):
        raise UserError(f"--image {image}: name a version or, better, a digest; `latest` is another image tomorrow")
    kustomize.set_image(objects, "captune", newName=repository, newTag=tag, digest=digest)


def _refine_options(recipe: Recipe, arm: str) -> list[str]:
    """`captune refine` reads the recipe's section `refine`; an arm's own settings go on the command line."""
    if not arm:
        return []
    wanted = yaml.safe_load(texts(recipe)[RECIPE])
    section, default = wanted["arms"][arm], wanted["refine"]
    return list(_different({key: section[key] for key in default}, default, "refine"))


def _word(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _train_options(recipe: Recipe, arm: str) -> list[str]:
    """What an arm's training does in a way of its own, and the seed."""
    if not arm:
        return []
    wanted = asdict(recipe.training(arm, recipe.seeds[0]))
    return list(_different(wanted, asdict(recipe.train), "train"))


def _different(wanted: dict[str, Any], default: dict[str, Any], section: str) -> Iterator[str]:
    for key, value in wanted.items():
        if isinstance(value, dict) and isinstance(default[key], dict) and default[key]:
            yield from _different(value, default[key], f"{section}.{key}")
        elif value != default[key]:
            yield from (f"--{section}.{key}", _word(value))


def _absolute(path: str) -> str:
    return path if path.startswith("/") else f"{DATA}/{path}"


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Texts of several lines as blocks; nothing as an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        """Every value stands where it is used."""
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _yaml(value: Object) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=140)
