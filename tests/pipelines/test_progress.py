"""What a log holds while work goes on."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
import torch.distributed as dist

from pipelines import progress
from pipelines.mgm.load import quiet


def test_a_log_has_few_lines_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every five seconds where something was done, every thirty where not."""
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    stream = io.StringIO()
    shown = progress.Progress(10, "train", "steps", stream=stream)
    for second in range(1, 121):
        now = float(second)
        shown.update(1 if second in (70, 76) else 0)
    moments = [line for line in stream.getvalue().splitlines() if "train:" in line]
    assert len(moments) == 1 + 2 + 2 + 1  # at 5, 35 and 65; at 70 and 76; at 106
    assert [line.split(" steps")[0] for line in moments[-3:]] == ["train: 1/10", "train: 2/10", "train: 2/10"]


def test_torchs_own_notices_stay_out_of_it() -> None:
    """What DeepSpeed calls hundreds of times a step is said to be deprecated each time; a log would be full of it."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            dist.all_gather_into_tensor(torch.zeros(2), torch.ones(2))
            loud = len(told)
            quiet()
            dist.all_gather_into_tensor(torch.zeros(2), torch.ones(2))
        assert loud == len(told) == 1
    finally:
        dist.destroy_process_group()
