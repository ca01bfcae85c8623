"""What a recipe needs of a cluster, and the manifests' numbers that follow from it.

An overlay says what one pod of a group offers (CPUs, GPUs, memory); a recipe says how many captioning replicas,
training workers and serving replicas it wants, and how large each is. The number of pods follows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from pipelines.caption.config import CaptionConfig
from pipelines.caption.sizing import cpus_beside, cpus_wanted
from pipelines.demand import Demand, Node
from pipelines.errors import UserError
from pipelines.groups import MOST, most
from ray_jobs.recipe import Recipe


@dataclass(frozen=True)
class Pod(Node):
    """What one pod of a group offers. Memory in bytes."""

    memory: float = field(kw_only=True)


def demands(recipe: Recipe, serving: int) -> dict[str, Demand]:
    """Group -> demand. `serving` is the most replicas that the endpoint may scale to."""
    caption, train, serve = recipe.caption.demand(), recipe.train.demand(), recipe.serve.demand()
    return {"caption": caption, "train": train, "serve": replace(serve, count=max(serving, serve.count))}


def fit(cluster: dict[str, Any], recipe: Recipe, serving: int) -> None:
    """Write the recipe's numbers into a RayCluster's spec.

    Raises:
        UserError: one replica or worker is larger than the pods of its group; the message names the key and the group.
    """
    wanted = demands(recipe, serving)
    for group in cluster["workerGroupSpecs"]:
        pod = offered(group)
        if pod.group == "cpu":
            least, most = 1, _cpu_pods(wanted, pod, recipe)
        elif wanted[pod.group].group != pod.group and pod.group != "serve":
            least, most = 0, 0  # group cpu does it
        else:
            if wanted[pod.group].gpus == 0:
                _without_gpus(group)
            least, most = 0, pods(wanted[pod.group], pod)
            _check_cache(recipe, wanted["train"], pod)
        start = least if cluster["enableInTreeAutoscaling"] else most
        group |= {"replicas": start, "minReplicas": least, "maxReplicas": most}


def describe(cluster: dict[str, Any]) -> None:
    """Tell the jobs of a cluster, by its head's labels, how large each group may become."""
    labels = cluster["headGroupSpec"]["labels"]
    for group in cluster["workerGroupSpecs"]:
        labels[f"{MOST}{group['groupName']}"] = most(group["maxReplicas"], offered(group))


def offered(group: dict[str, Any]) -> Pod:
    """What a pod of a worker group offers: its Ray container's limits."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    return Pod(
        cpus=quantity(limits["cpu"]),
        gpus=quantity(limits.get("nvidia.com/gpu", 0)),
        group=group["groupName"],
        memory=quantity(limits["memory"]),
    )


def pods(demand: Demand, pod: Pod) -> int:
    """Pods that hold a demand; fractions share a GPU, and never span two."""
    per_pod = _per_pod(demand, pod)
    return math.ceil(demand.count / per_pod)


def _per_pod(demand: Demand, pod: Pod) -> int:
    for problem in demand.too_large([pod], f"a pod of the overlay's group {pod.group}"):
        raise UserError(str(problem))
    return demand.per_node(pod)


def _cpu_pods(wanted: dict[str, Demand], pod: Pod, recipe: Recipe) -> int:
    """Group cpu serves the hungriest of the stages, which come one after another."""
    train = wanted["train"]
    needs = [_caption_pods(wanted["caption"], pod, recipe.caption)]
    if train.gpus == 0:
        needs.append(pods(train, pod))
        _check_cache(recipe, train, pod)
    if wanted["serve"].gpus == 0:  # the replicas of an evaluation; those of the endpoint have a group of their own
        needs.append(pods(recipe.serve.demand(), pod))
    return max(needs)


def _caption_pods(demand: Demand, pod: Pod, config: CaptionConfig) -> int:
    """Pods of group cpu in which captioning runs every replica that the recipe asks for, or feeds those on GPUs."""
    if demand.gpus:
        return math.ceil(cpus_beside(config) / pod.cpus)
    count = max(math.ceil(cpus_wanted(config) / pod.cpus - 1e-9), pods(demand, pod))
    if demand.count > 1:
        while _whole_cpus_left(demand, pod, count) < int(cpus_beside(config)):
            count += 1  # a filter or a task of a whole CPU finds none in what replicas leave of two pods
    return count


def _whole_cpus_left(demand: Demand, pod: Pod, count: int) -> int:
    """Whole CPUs that `count` pods have left once they hold a demand, packed as tightly as it goes."""
    per_pod = _per_pod(demand, pod)
    full, rest = divmod(demand.count, per_pod)
    held = [per_pod] * full + [rest] + [0] * count
    return sum(int(pod.cpus - replicas * demand.cpus + 1e-9) for replicas in held[:count])


def _check_cache(recipe: Recipe, train: Demand, pod: Pod) -> None:
    """Cached features of all workers in a pod may take half of its memory."""
    if pod.group not in ("cpu", "train"):
        return
    cached = recipe.train.feature_cache_mb * 2**20 * min(_per_pod(train, pod), train.count)
    if cached > pod.memory / 2:
        raise UserError(
            f"train.feature_cache_mb: {cached / 2**30:.1f} GiB in a pod of group {pod.group}, which has "
            f"{pod.memory / 2**30:g} GiB; "
            "half of it is the most"
        )


def _without_gpus(group: dict[str, Any]) -> None:
    """A recipe that answers on CPUs must not hold a card for it."""
    for kind in group["template"]["spec"]["containers"][0]["resources"].values():
        kind.pop("nvidia.com/gpu", None)


_SUFFIXES = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12} | {
    f"{p}i": 2.0 ** (10 * n) for n, p in enumerate("KMGT", 1)
}


def quantity(value: str | int | float) -> float:
    """A Kubernetes quantity ("500m", "16Gi", 2) as a number."""
    text = str(value)
    for suffix in sorted(_SUFFIXES, key=len, reverse=True):
        if text.endswith(suffix):
            return float(text.removesuffix(suffix)) * _SUFFIXES[suffix]
    return float(text)
