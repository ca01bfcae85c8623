"""Which nodes are bought for which work: Ray's own autoscaler reads the manifests and decides."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import ClusterResourceConstraint, GangResourceRequest
from ray.core.generated.common_pb2 import LabelSelectorOperator

from k8s import render
from pipelines import cluster, groups
from pipelines.caption.sizing import size_pass
from pipelines.demand import CPU, Demand
from pipelines.errors import NotReady
from ray_jobs import _plan, run
from ray_jobs._options import parse
from ray_jobs.recipe import Recipe

OVERLAYS = {"kind": "sample", "gpu-24gb": "mgm2b_30k_published", "gpu-80gb": "mgm2b_1m"}
"""Those with an autoscaler, and the recipe that each is made for. Kueue's has its pods from the start."""


@dataclass(frozen=True)
class Ask:
    """So many equal requests of a stage, waiting at once.

    Attributes:
        together: all or none of them, as training's workers.
        size: they ask for a cluster that could hold them, as Ray Data does besides starting its tasks.
    """

    count: int
    cpus: float
    gpus: float
    labels: dict[str, str]
    together: bool = False
    size: bool = False

    def requests(self) -> list[Any]:
        """As the autoscaler gets them from Ray."""
        selectors = []
        for key, value in self.labels.items():
            listed = re.fullmatch(r"in\((.*)\)", value)
            values = listed[1].split(",") if listed else [value]
            selectors.append([(key, LabelSelectorOperator.LABEL_OPERATOR_IN, values)])
        wanted = {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})
        return [ResourceRequestUtil.make(wanted, label_selectors=selectors) for _ in range(self.count)]


@cache
def recipe_of(name: str) -> Recipe:
    return parse(run.COMMAND, [name])[0]


def cluster_of(overlay: str, job: str, recipe: Recipe | None = None) -> dict[str, Any]:
    """The RayCluster that KubeRay makes for a job."""
    objects = render.render(recipe or recipe_of(OVERLAYS[overlay]), overlay, job)
    (found,) = (found for found in objects if found["kind"] == "RayJob")
    return {"metadata": {"name": f"captune-{job}-x7k2p", "namespace": "captune"}, "spec": render.cluster_spec(found)}


def bought(job: dict[str, Any], *asks: Ask) -> tuple[dict[str, int], int]:
    """Nodes that the autoscaler launches for what is asked at once, by group, and how many requests it can never
    satisfy, which it says as "No available node types can fulfill".
    """
    config = AutoscalingConfig(_derive_autoscaling_config_from_ray_cr(job))
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_nodes(),
        gang_resource_requests=[GangResourceRequest(requests=ask.requests()) for ask in asks if ask.together],
    )
    waiting = [shape for ask in asks if not (ask.together or ask.size) for shape in ask.requests()]
    request.resource_requests = ResourceRequestUtil.group_by_count(waiting)
    if sized := [shape for ask in asks if ask.size for shape in ask.requests()]:
        shapes = ResourceRequestUtil.group_by_count(sized)
        request.cluster_resource_constraints = [ClusterResourceConstraint(resource_requests=shapes)]
    reply = ResourceDemandScheduler().schedule(request)
    launched = {launch.instance_type: launch.count for launch in reply.to_launch if launch.instance_type != "headgroup"}
    refused = [reply.infeasible_resource_requests, reply.infeasible_gang_resource_requests]
    return launched, sum(map(len, [*refused, reply.infeasible_cluster_resource_constraints]))


@pytest.fixture
def head_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], None]:
    """Makes a job's head, as the manifest labels it, and one pod of group cpu all that a stage sees of its cluster."""

    def see(job: dict[str, Any]) -> None:
        spec = job["spec"]
        (cpu,) = (group for group in spec["workerGroupSpecs"] if group["groupName"] == CPU)
        limits = cpu["template"]["spec"]["containers"][0]["resources"]["limits"]
        there = [
            {"Alive": True, "Labels": spec["headGroupSpec"]["labels"], "Resources": {"CPU": 0.0}},
            {"Alive": True, "Labels": cpu["labels"], "Resources": {"CPU": float(limits["cpu"])}},
        ]
        monkeypatch.setattr(groups, "_alive", lambda: there)

    return see


def together(demand: Demand) -> Ask:
    return Ask(demand.count, demand.cpus, demand.gpus, groups.selector(demand.group), together=True)


def one_by_one(demand: Demand) -> Ask:
    return Ask(demand.count, demand.cpus, demand.gpus, groups.selector(demand.group))


def cpus_of(*names: str) -> float:
    return sum(node.cpus for node in groups.room(groups.at_most(), *names))


def captioning(recipe: Recipe) -> Iterator[Ask]:
    """Every replica, tasks beside them on all CPUs that are left to them, and the cluster that Ray Data wishes for."""
    config = recipe.caption
    group = config.demand().group
    most = groups.room(groups.at_most(), CPU, group)
    sizing = size_pass(config, sum(node.cpus for node in most), sum(node.gpus for node in most))
    left = cpus_of(CPU) - (sizing.max_actors * sizing.actor_cpus if group == CPU else 0)
    replicas, tasks = sizing.max_actors, math.floor(left / sizing.task_cpus)
    yield Ask(replicas, sizing.actor_cpus, config.gpus_per_actor, groups.selector(group))
    yield Ask(tasks, sizing.task_cpus, 0, groups.selector(CPU))
    yield Ask(replicas, sizing.actor_cpus, config.gpus_per_actor, groups.selector(CPU, group), size=True)
    yield Ask(tasks, sizing.task_cpus, 0, groups.selector(CPU, group), size=True)


def refining(recipe: Recipe) -> Iterator[Ask]:
    """As many operator tasks as group cpu at its largest has CPUs, whatever waits behind them."""
    (asked, *_) = [config.demand(arm) for arm, config in recipe.arms.items() if config.recipe]
    tasks = math.floor(cpus_of(CPU) / asked.cpus)
    yield Ask(tasks, asked.cpus, 0, groups.selector(asked.group))
    yield Ask(tasks, asked.cpus, 0, groups.selector(asked.group), size=True)


STAGES: dict[str, Callable[[Recipe], Iterator[Ask]]] = {
    "caption": captioning,
    "refine": refining,
    "train": lambda recipe: iter([together(recipe.train.demand())]),
    "merge": lambda recipe: iter(()),  # the job's own process does all of it
    "evaluate": lambda recipe: iter([one_by_one(recipe.serve.demand())]),
    "compare": lambda recipe: iter(()),
}


@pytest.mark.parametrize("job", ["run", "its own"])
@pytest.mark.parametrize(
    ("overlay", "expected"),
    [
        ("kind", {}),
        ("gpu-24gb", {"caption": {"caption": 1}, "train": {"train": 1}, "evaluate": {"serve": 1}}),
        ("gpu-80gb", {"caption": {"caption": 8}, "train": {"train": 1}, "evaluate": {"serve": 2}}),
    ],
)
def test_a_stage_buys_the_cards_of_its_own_group_and_no_others(
    overlay: str, expected: dict[str, dict[str, int]], job: str, head_of: Any
) -> None:
    recipe = recipe_of(OVERLAYS[overlay])
    for stage, asks in STAGES.items():
        made = cluster_of(overlay, "run" if job == "run" else stage)
        head_of(made)
        launched, refused = bought(made, *asks(recipe))
        cpu_pods = launched.pop("cpu")
        assert (launched, refused) == (expected.get(stage, {}), 0), stage
        fed = {"kind": 1, "gpu-24gb": 1, "gpu-80gb": 3}[overlay]
        assert cpu_pods == (fed if stage in ("caption", "refine") else 1), stage


@pytest.mark.parametrize("overlay", ["gpu-24gb", "gpu-80gb"])
def test_a_recipe_without_cards_buys_none_where_there_are_some(overlay: str, head_of: Any) -> None:
    recipe = recipe_of("sample")
    for stage, asks in STAGES.items():
        made = cluster_of(overlay, "run", recipe)
        head_of(made)
        launched, refused = bought(made, *asks(recipe))
        assert (set(launched), refused) == ({"cpu"}, 0), stage


def test_captioning_that_finds_all_its_group_at_work_leaves_the_training_pod_alone(head_of: Any) -> None:
    """More replicas than the group has cards are refused, not put where another stage's cards are."""
    made = cluster_of("gpu-80gb", "run")
    head_of(made)
    assert bought(made, Ask(9, 1, 1, groups.selector("caption"))) == ({"cpu": 1, "caption": 8}, 1)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_run_is_let_in_before_its_cards_are_there(overlay: str, head_of: Any, capsys: Any) -> None:
    """The cluster is asked for what it can become, which its head alone knows; and what it can never be is refused."""
    recipe = recipe_of(OVERLAYS[overlay])
    head_of(cluster_of(overlay, "run"))
    cluster.require_room(recipe.caption, _plan.demands(recipe))
    waits = "waiting for the cluster to grow" in capsys.readouterr().err
    assert waits == (overlay != "kind")
    with pytest.raises(NotReady, match="replica needs 1 GPU" if overlay == "kind" else "99 replicas need"):
        cluster.require_room(demands=[Demand("serve", "replica", 1 if overlay == "kind" else 99, 1, 1)])


def test_without_work_one_small_node_stays() -> None:
    for overlay in OVERLAYS:
        assert bought(cluster_of(overlay, "run")) == ({"cpu": 1}, 0)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_head_takes_no_work(overlay: str) -> None:
    config = _derive_autoscaling_config_from_ray_cr(cluster_of(overlay, "run"))
    assert config["available_node_types"]["headgroup"]["resources"] | {"memory": 0} == {"CPU": 0, "GPU": 0, "memory": 0}
    assert config["idle_timeout_minutes"] == 5
