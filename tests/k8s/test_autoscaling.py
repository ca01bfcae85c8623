"""Which nodes are bought for which work: Ray's own autoscaler reads the manifests and decides."""

from __future__ import annotations

from typing import Any

import pytest
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import GangResourceRequest

from k8s import kustomize, render

CAPTIONER = {"CPU": 1, "GPU": 1}
TRAINER = {"CPU": 4, "GPU": 1}
DECODER = {"CPU": 1}


def cluster_of(overlay: str, job: str) -> dict[str, Any]:
    """The RayCluster that KubeRay makes for a job."""
    objects = kustomize.build(render.FOLDER / "overlays" / overlay)
    found = next(
        found for found in objects if found["kind"] == "RayJob" and found["metadata"]["name"] == f"captune-{job}"
    )
    return {"metadata": {"name": f"captune-{job}-x7k2p", "namespace": "captune"}, "spec": render.cluster_spec(found)}


def bought(
    overlay: str, wanted: dict[str, float], count: int, together: bool = False, job: str = "run"
) -> tuple[dict[str, int], int]:
    """Nodes that the autoscaler launches for `count` requests at once, by group, and how many requests it can never
    satisfy.
    """
    config = AutoscalingConfig(_derive_autoscaling_config_from_ray_cr(cluster_of(overlay, job)))
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_nodes(),
    )
    shapes = [ResourceRequestUtil.make(wanted) for _ in range(count)]
    if together:
        request.gang_resource_requests = [GangResourceRequest(requests=shapes)]
    else:
        request.resource_requests = ResourceRequestUtil.group_by_count(shapes)
    reply = ResourceDemandScheduler().schedule(request)
    launched = {launch.instance_type: launch.count for launch in reply.to_launch if launch.instance_type != "headgroup"}
    return launched, len(reply.infeasible_resource_requests) + len(reply.infeasible_gang_resource_requests)


def test_captioning_buys_spot_nodes_one_for_every_replica() -> None:
    assert bought("gpu-80gb", CAPTIONER, 8, job="caption") == ({"cpu": 1, "caption": 8}, 0)
    assert bought("gpu-24gb", CAPTIONER, 1) == ({"cpu": 1, "caption": 1}, 0)


def test_in_a_whole_run_captioning_may_have_the_training_pod_first() -> None:
    """Ray's autoscaler weighs fit before `priority`: four replicas fill a pod of four cards, which training needs later
    anyway.
    """
    assert bought("gpu-80gb", CAPTIONER, 8) == ({"cpu": 1, "train": 1, "caption": 4}, 0)


def test_training_buys_its_own_nodes_and_never_spot_ones() -> None:
    assert bought("gpu-80gb", TRAINER, 4, together=True) == ({"cpu": 1, "train": 1}, 0)
    assert bought("gpu-24gb", TRAINER, 1, together=True) == ({"cpu": 1, "train": 1}, 0)


def test_reading_and_decoding_buy_no_cards() -> None:
    assert bought("gpu-80gb", DECODER, 48) == ({"cpu": 3}, 0)


def test_without_work_one_small_node_stays() -> None:
    assert bought("gpu-80gb", {}, 0) == ({"cpu": 1}, 0)


def test_a_laptop_has_no_cards_and_says_so() -> None:
    assert bought("kind", CAPTIONER, 1) == ({"cpu": 1}, 1)


@pytest.mark.parametrize("overlay", ["kind", "gpu-24gb", "gpu-80gb"])
def test_the_head_takes_no_work(overlay: str) -> None:
    config = _derive_autoscaling_config_from_ray_cr(cluster_of(overlay, "run"))
    assert config["available_node_types"]["headgroup"]["resources"] | {"memory": 0} == {"CPU": 0, "GPU": 0, "memory": 0}
    assert config["idle_timeout_minutes"] == 5
