"""Kill the node that trains, in the middle: another node goes on from the last checkpoint and ends with the same loss.

    python tests/drills/drill_train_node.py

Two runs of the same training on a cluster of a head and two workers, token authentication on: one undisturbed, one that
loses the node of its Ray Train worker (every process of the node is killed at once, as a machine dies). Two minutes on
two cores.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from tests.cluster.cluster import Cluster  # noqa: E402
from tests.cluster.small import draw_world  # noqa: E402
from tests.drills.record import Record  # noqa: E402

STEPS, EVERY = 60, 10


def command(world: Path, output: Path) -> list[str]:
    """Instruction tuning of the sample's model; a dropout of 0.1 and a cosine schedule, so that a wrong restart
    shows.
    """
    words = ["python", "ray_jobs/train.py", "--input", world / "instruct.json", "--model", world / "models" / "mgm"]
    words += ["--output", output, "--train.instruct_data", world / "instruct.json", "--train.align.steps", 0]
    words += ["--train.instruct.steps", STEPS, "--train.instruct.micro_batch", 4, "--train.instruct.accumulation", 1]
    words += ["--train.max_length", 128, "--train.checkpoint_every", EVERY]
    return [str(word) for word in words]


def log_of(output: Path) -> list[dict]:
    """The training log; a line that is being written is left out."""
    path = output / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def main() -> int:
    """Run the drill."""
    record = Record("drill: the training node is lost")
    with tempfile.TemporaryDirectory() as scratch, Cluster() as cluster:
        root = Path(scratch)
        world = draw_world(root / "world", pairs=2, instructions=96)
        cluster.start_head()
        for name in ("one", "two"):
            cluster.add_node(name, cpus=2)
        record.say("up: a head without CPUs, nodes one and two")
        cluster.submit(*command(world, root / "whole"), job="whole", working_dir=ROOT)
        cluster.wait("whole")
        whole = log_of(root / "whole")[-1]
        record.say(f"undisturbed: {whole['step']} steps, loss {whole['loss']:.6f}")

        cluster.submit(*command(world, root / "killed"), job="killed", working_dir=ROOT)
        while not any(line["step"] >= 2 * EVERY + 3 for line in log_of(root / "killed")):
            assert cluster.status("killed") in ("PENDING", "RUNNING"), cluster.logs("killed")
            time.sleep(0.05)
        trains = [node for node in cluster.nodes.values() if any("RayTrainWorker" in name for name in node.names())]
        record.check(len(trains) == 1, f"one node trains: {trains[0].name}")
        at = log_of(root / "killed")[-1]["step"]
        record.say(f"killed: node {trains[0].name} at step {at}, {trains[0].kill()} processes")
        cluster.wait("killed")
        log = log_of(root / "killed")
        record.say(f"came back: {log[-1]['step']} steps, loss {log[-1]['loss']:.6f}")
        record.check([line["step"] for line in log] == list(range(1, STEPS + 1)), "the log has every step once")
        apart = max(abs(a["loss"] - b["loss"]) for a, b in zip(log_of(root / "whole"), log, strict=True))
        record.check(apart < 1e-4, f"losses of both runs differ by at most {apart:.1e} at any step")
        weights = [(root / run / "adapter_model.safetensors").read_bytes() for run in ("whole", "killed")]
        record.say(f"adapters are {'the same bytes' if weights[0] == weights[1] else 'not the same bytes'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
