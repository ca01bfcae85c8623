"""What a stage asks for against what machines have, and outputs that cannot be written."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines import machine, preflight
from pipelines.caption.config import CaptionConfig
from pipelines.demand import Node
from pipelines.errors import NotReady, Problem
from pipelines.train.config import TrainConfig
from serve.config import ServeConfig


def test_this_machine_is_counted_as_ray_counts_it() -> None:
    from ray._private.utils import get_num_cpus

    assert machine.cpus() == int(get_num_cpus())


@pytest.mark.parametrize(
    ("train", "nodes", "said"),
    [
        (
            TrainConfig(workers=64),
            [Node(2, 0)],
            ["train.workers: 64 workers need 1 CPU each, here has room for 2 (2 CPUs)"],
        ),
        (
            TrainConfig(use_gpu=True, cpus_per_worker=4),
            [Node(2, 0)],
            [
                "train.cpus_per_worker: a worker needs 4 CPUs, here has 2 CPUs",
                "train.use_gpu: a worker needs 1 GPU, here has no GPU",
            ],
        ),
        (TrainConfig(workers=2, cpus_per_worker=3), [Node(4, 0), Node(4, 0)], []),
        # six CPUs in all, and no machine that holds both
        (
            TrainConfig(workers=2, cpus_per_worker=3),
            [Node(5, 0), Node(1, 0)],
            ["train.workers: 2 workers need 3 CPUs each"],
        ),
    ],
)
def test_workers_need_machines_that_hold_them(train: TrainConfig, nodes: list[Node], said: list[str]) -> None:
    found = [str(problem) for problem in preflight.resources(nodes, "here", None, [train.demand()])]
    assert len(found) == len(said)
    assert all(text.startswith(words) for text, words in zip(found, said, strict=True))


def test_replicas_share_a_card_but_never_span_two() -> None:
    def missing(share: float, replicas: int) -> list[Problem]:
        demand = ServeConfig(gpus_per_replica=share, replicas=replicas).demand()
        return list(preflight.resources([Node(16, 1), Node(16, 1)], "here", None, [demand]))

    assert missing(0.5, 4) == []
    assert [problem.key for problem in missing(0.5, 5)] == ["serve.replicas"]
    assert [problem.key for problem in missing(2.0, 1)] == ["serve.gpus_per_replica"]


def test_captioning_makes_do_with_fewer_replicas_but_not_without_a_card() -> None:
    many = CaptionConfig(actors=50)
    assert list(preflight.resources([Node(2, 0)], "here", many)) == []
    found = list(preflight.resources([Node(2, 0)], "here", CaptionConfig(gpus_per_actor=1)))
    assert [problem.key for problem in found] == ["caption.gpus_per_actor"]


def test_an_output_on_a_full_disk_or_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert list(preflight.output(tmp_path / "new" / "deep")) == []
    assert "is a file" in str(next(preflight.output(tmp_path / "file" / "deep")))
    assert "GB free" in str(next(preflight.output(tmp_path / "new", size=2**60, what="merged models")))


def test_one_problem_is_one_line_and_equal_ones_are_said_once() -> None:
    with pytest.raises(NotReady, match=r"^dataset: none$"):
        preflight.require([Problem("dataset", "none")] * 2)
