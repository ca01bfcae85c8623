"""DeepSpeed ZeRO-2 and ZeRO-3 (Rajbhandari et al. 2019, arXiv:1910.02054) behind the same interface as
`TorchEngine`.
"""

from __future__ import annotations

import fcntl
import io
import logging
import os
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipelines.errors import UserError, WorkFailed
from pipelines.train.config import PhaseConfig
from pipelines.train.data import Batch
from pipelines.train.step import StepResult, TrainForward, adamw, count, mean_loss, require_finite, set_rate, total

_TAG = "state"
_EXTENSIONS = Path.home() / ".cache" / "captune" / "torch_extensions"


_BUCKET = 500_000_000
LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's own defaults: numbers whose gradients are exchanged together, and gathered ones of ZeRO-3."""


def bucket_size(learns: int) -> int:
    """Numbers of a buffer for gradients, which DeepSpeed allocates in full: no more than there are."""
    return min(_BUCKET, learns)


def deepspeed_config(
    stage: int, phase: PhaseConfig, precision: str, device: torch.device, learns: int = _BUCKET
) -> dict[str, Any]:
    """DeepSpeed's own configuration of one phase, in which so many numbers learn."""
    return {
        "train_micro_batch_size_per_gpu": phase.micro_batch,
        "gradient_accumulation_steps": phase.accumulation,
        "gradient_clipping": phase.max_grad_norm,
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": device.type == "cuda",
            "contiguous_gradients": True,
            "reduce_bucket_size": bucket_size(learns),
            "stage3_max_live_parameters": LIVE_PARAMETERS,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def build_cpu_operator() -> None:
    """Compile DeepSpeed's shared-memory operator (a minute, once per machine), one process at a time.

    PyTorch guards its extension cache with a plain file, and a process killed while compiling leaves that file behind:
    from then on every start waits for ever. Here a lock that dies with its holder guards a cache of our own, in which a
    file left behind is therefore known to be nobody's.
    """
    if "TORCH_EXTENSIONS_DIR" in os.environ and os.environ["TORCH_EXTENSIONS_DIR"] != str(_EXTENSIONS):
        return  # somebody else's cache: DeepSpeed builds there by itself
    os.environ["TORCH_EXTENSIONS_DIR"] = str(_EXTENSIONS)
    from deepspeed.comm.torch import build_shm_op

    _EXTENSIONS.mkdir(parents=True, exist_ok=True)
    with (_EXTENSIONS / "captune.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        for left_behind in _EXTENSIONS.glob("*/lock"):
            left_behind.unlink()
        with redirect_stdout(io.StringIO()):  # every worker would say that it is there
            build_shm_op()


class ZeroEngine:
    """ZeRO-2 or ZeRO-3 training; refuses to run when DeepSpeed turns out to do anything else.

    DeepSpeed keeps the model in bf16 and float32 master weights in its sharded optimizer.
    """

    cut: int | None = None

    def __init__(
        self, forward: TrainForward, stage: int, phase: PhaseConfig, precision: str, device: torch.device
    ) -> None:
        os.environ.setdefault("DS_ACCELERATOR", device.type)
        os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
        try:
            import deepspeed
        except ImportError as error:
            raise UserError(f"train.strategy zero{stage} needs DeepSpeed, which cannot be imported: {error}") from error
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        if device.type == "cpu":
            build_cpu_operator()
        self.phase, self.device, self.stage, self.method = phase, device, stage, forward.method
        forward.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.named = {n: p for n, p in forward.model.named_parameters() if p.requires_grad}
        deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
        self.engine, *_ = deepspeed.initialize(
            model=forward,
            optimizer=adamw(self.named.items(), phase),
            config=deepspeed_config(stage, phase, precision, device, sum(p.numel() for p in self.named.values())),
        )
        if self.engine.zero_optimization_stage() != stage or not self.engine.zero_optimization():
            raise WorkFailed(f"DeepSpeed runs ZeRO stage {self.engine.zero_optimization_stage()}, not {stage}")
        sharded = all(hasattr(parameter, "ds_id") for parameter in self.named.values())
        if stage == 3 and not sharded:
            raise WorkFailed("DeepSpeed did not shard the parameters although ZeRO-3 was asked for")

    def step(self, batches: list[Batch], learning_rate: float) -> StepResult:
        """As `TorchEngine.step`, but without mending: what DeepSpeed has begun to exchange cannot be taken back, so
        `torch.OutOfMemoryError` is raised and the workers have to start again with smaller micro-batches.
        """
        counts = count(batches, self.device)
        set_rate(self.engine.optimizer.param_groups, learning_rate)
        loss_sum = torch.zeros((), device=self.device)
        for batch, (run_towers, most) in zip(batches, self._all_do(batches), strict=True):
            loss = self.engine(batch.to(self.device), run_towers, most)
            # DeepSpeed averages over the workers; the division by accumulation is ours (by target tokens), not its own.
            self.engine.backward(loss * (dist.get_world_size() / counts.targets), scale_wrt_gas=False)
            self.engine.step()
            loss_sum += loss.detach()
        loss_mean = total(float(loss_sum), self.device) / counts.targets
        grad_norm = float(self.engine.get_global_grad_norm() or 0.0)
        require_finite(loss_mean, grad_norm)
        return StepResult(loss_mean, grad_norm, counts)

    def _all_do(self, batches: list[Batch]) -> list[tuple[bool, int]]:
        """Of each micro-batch, whether some worker runs the towers and the most targets that one has.

        ZeRO-3 shards the weights of towers and head too: who calls a module less often than others leaves them waiting
        for its shards, or answers with other weights'.
        """
        found = torch.tensor([(batch.pixels is not None, batch.targets) for batch in batches], device=self.device)
        if self.stage == 3:
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return [(bool(run_towers), most) for run_towers, most in found.tolist()]

    def evaluate(self, batches: list[Batch]) -> float:
        """As `TorchEngine.evaluate`."""
        return mean_loss(self.engine, batches, self.device, all_do=self._all_do(batches))

    def weights(self) -> dict[str, torch.Tensor]:
        """The float32 master weights, gathered from their shards."""
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(p).detach().float().cpu().clone() for name, p in self.named.items()}

    def save(self, directory: Path) -> None:
        """Every worker writes its shard of the optimizer's state."""
        self.engine.save_checkpoint(str(directory / "zero"), tag=_TAG, exclude_frozen_parameters=True)

    def load(self, directory: Path) -> None:
        """Continue from the shards that `save` wrote on equally many workers."""
        found, _ = self.engine.load_checkpoint(str(directory / "zero"), tag=_TAG, load_module_strict=False)
        if found is None:
            raise WorkFailed(f"{directory / 'zero'}: DeepSpeed could not load its own checkpoint")

    def close(self) -> None:
        """Free DeepSpeed's buffers before the next phase."""
        self.engine.destroy()
