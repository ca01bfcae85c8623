"""The numbers that the manifests give a recipe are the numbers that captioning asks for when it runs there."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import pytest

from k8s import kustomize, needs, render
from pipelines.caption.config import CaptionConfig
from pipelines.caption.sizing import Sizing, cpus_wanted, size_pass
from pipelines.errors import UserError
from ray_jobs import run
from ray_jobs._options import parse
from ray_jobs.recipe import Recipe

Pods = dict[str, list[needs.Pod]]
_LARGEST_POD = {"kind": (2, 0), "gpu-24gb": (8, 1), "gpu-80gb": (16, 1), "gpu-80gb-kueue": (16, 1)}
"""CPUs of group cpu, and GPUs of group caption: what one replica may have."""
WISHES = [
    CaptionConfig(actors=actors, max_actors=most, cpus_per_actor=cpus, gpus_per_actor=gpus)
    for (actors, most), cpus, gpus in product(
        [(1, 0), (2, 0), (3, 5), (7, 0), (11, 0), (15, 0), (20, 64)],
        [0.25, 0.3, 1.0, 1.5, 2.0, 7.0],
        [0.0, 0.3, 0.5, 1.0],
    )
]


@cache
def _sample() -> Recipe:
    return parse(run.COMMAND, ["sample"])[0]


@cache
def _job(overlay: str) -> dict[str, Any]:
    built = kustomize.build(render.FOLDER / "overlays" / overlay)
    return next(found for found in built if found["metadata"]["name"] == "captune-run")


def _rendered(overlay: str, wish: CaptionConfig) -> Pods:
    """Group -> its pods at most, after `render` has put a recipe's numbers in."""
    job = copy.deepcopy(_job(overlay))
    recipe = replace(_sample(), caption=wish)
    render.fill([job], recipe, 1, render.Step("run"))
    groups = render.cluster_spec(job)["workerGroupSpecs"]
    return {group["groupName"]: [needs.offered(group)] * group["maxReplicas"] for group in groups}


def _sized(wish: CaptionConfig, pods: list[needs.Pod]) -> Sizing:
    return size_pass(wish, sum(pod.cpus for pod in pods), sum(pod.gpus for pod in pods))


def _placed(wish: CaptionConfig, sizing: Sizing, pods: list[needs.Pod]) -> bool:
    """Whether each replica, then the checkpoint filter, then a task of each kind find a pod."""
    free = [[pod.cpus, pod.gpus] for pod in pods]
    tasks = 2 if sizing.decode_inside else 3
    parts = [(sizing.actor_cpus, wish.gpus_per_actor)] * sizing.max_actors
    parts += [(1.0, 0.0)] + [(sizing.task_cpus, 0.0)] * tasks
    for cpus, gpus in parts:
        # a part without GPUs goes where there are none, so that it takes no card's CPUs
        room = [at for at in free if at[0] > cpus - 1e-9 and at[1] > gpus - 1e-9]
        if not room:
            return False
        at = min(room, key=lambda at: at[1])
        at[0] -= cpus
        at[1] -= gpus
    return True


@pytest.mark.parametrize("overlay", render.OVERLAYS)
def test_every_replica_that_a_recipe_asks_for_runs_on_the_pods_that_are_rendered(overlay: str) -> None:
    cpus, gpus = _LARGEST_POD[overlay]
    held = 0
    for wish in WISHES:
        fits = wish.gpus_per_actor <= gpus and wish.cpus_per_actor <= (2 if wish.gpus_per_actor else cpus)
        if not fits:
            with pytest.raises(UserError, match=r"caption\.[cg]pus_per_actor: a replica needs"):
                _rendered(overlay, wish)
            continue
        pods = _rendered(overlay, wish)
        captioning = [*pods["cpu"], *pods["caption"]]
        asked = max(wish.actors, wish.max_actors)
        assert _sized(wish, captioning).max_actors == asked, wish
        assert _sized(wish, [pod for group in pods.values() for pod in group]).max_actors == asked, wish
        assert _placed(wish, _sized(wish, captioning), captioning), wish
        held += 1
    assert held >= 30, "wishes that fit are what this is about"


def test_a_larger_cluster_never_runs_fewer_replicas_and_no_more_is_wanted_than_that_takes() -> None:
    clusters = [2 + step / 4 for step in range(4 * 30)]
    for wish in WISHES:
        if wish.gpus_per_actor:
            continue
        given = [size_pass(wish, cpus, 0).max_actors for cpus in clusters]
        assert given == sorted(given), wish
        asked, wanted = max(wish.actors, wish.max_actors), cpus_wanted(wish)
        enough = [cpus for cpus, actors in zip(clusters, given, strict=True) if actors == asked]
        assert enough == [cpus for cpus in clusters if cpus >= wanted], wish
