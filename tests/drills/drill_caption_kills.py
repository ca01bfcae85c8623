"""Captioning under fire: -9 to replicas, worker processes, whole nodes and the driver, at random moments, then a count
of ids.

    python tests/drills/drill_caption_kills.py [--rows 20000] [--every 12] [--minutes 6] [--candidates 4] [--seed 0]
    [--record FILE]

A real cluster of a head and two worker nodes on this machine captions `--rows` distinct JPEGs twice with the tests'
tiny BLIP-2, which samples `--candidates` captions of each: once in peace, once while something is killed every
`--every` seconds on average, until the work is done or `--minutes` are over. Held against each other: every id exactly
once, no row lost, every caption and candidate the same. Prints what was killed and when; exit status 1 when a row
differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ |= {
    # a temporary folder of its own (short: Ray puts sockets in it), so that nobody else's `ray.init()` finds this
    # cluster
    "RAY_TMPDIR": tempfile.mkdtemp(prefix="ck-", dir="/tmp"),
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_health_check_period_ms": "1000",  # a lost node is noticed in seconds: the drill is about what happens then
    "RAY_health_check_failure_threshold": "3",
    "OMP_NUM_THREADS": "1",
}
DRIVER = """
import sys, ray, logging
from pathlib import Path
from pipelines.caption.config import CandidateConfig, CaptionConfig, DecodingConfig
from pipelines.caption.stage import run
ray.init(address=sys.argv[1], logging_level=logging.ERROR, log_to_driver=False)
config = CaptionConfig(model=sys.argv[4], batch_size=16, max_new_tokens=16, actors=1, max_actors=2, cpus_per_actor=0.5)
config.decoding = DecodingConfig(method="sample")
config.candidates = CandidateConfig(count=int(sys.argv[5]), choose="random_any")
config.guards.max_repetition = 1.0
run(sys.argv[2], Path(sys.argv[3]), config)
"""
KINDS = ("replica", "worker", "node", "driver")
NODE = {"num_cpus": 2, "object_store_memory": 150 << 20}


class Hunt:
    """The cluster, the driver and the list of what was killed.

    Args:
        place: folder of dataset, model and outputs.
    """

    def __init__(self, place: Path, candidates: int, seed: int) -> None:
        from ray.cluster_utils import Cluster

        self.place, self.candidates, self.choose = place, candidates, random.Random(seed)
        head = {"num_cpus": 1, "object_store_memory": 150 << 20, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes = [self.cluster.add_node(**NODE) for _ in range(2)]
        self.driver: subprocess.Popen[bytes] | None = None
        self.killed: list[dict[str, Any]] = []
        self.began = time.monotonic()

    def start(self, output: str) -> subprocess.Popen[bytes]:
        """The command, as often as it takes."""
        paths = [str(self.place / name) for name in ("data", output, "blip2")]
        words = [self.cluster.address, *paths, str(self.candidates)]
        self.driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, *words],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=(self.place / f"{output}.log").open("ab"),
        )
        return self.driver

    def until_done(self, output: str, between: Callable[[], None]) -> None:
        """Start it, kill with `between`, start it again after a driver's death or a failure, until the manifest is
        there.
        """
        failures = 0
        while not (self.place / output / "MANIFEST.json").exists():
            driver = self.start(output)
            while driver.poll() is None:
                between()
            if driver.returncode not in (0, -signal.SIGKILL):
                failures += 1
                self.note("-", f"the driver ended with status {driver.returncode}; the same command continues")
                assert failures < 30, (self.place / f"{output}.log").read_text()[-4000:]

    def strike(self, output: str) -> None:
        """Kill one thing."""
        kind = self.choose.choice(KINDS)
        victim = getattr(self, f"_kill_{kind}")()
        if victim:
            blocks = len(list((self.place / output).glob("_work/checkpoint-*/*.parquet")))
            self.note(kind, victim, blocks)

    def note(self, kind: str, what: str, blocks: int = 0) -> None:
        self.killed.append(
            {"second": round(time.monotonic() - self.began), "kind": kind, "what": what, "blocks": blocks}
        )
        print(f"{self.killed[-1]['second']:>6} s  {kind:<8} {what}  ({blocks} blocks committed)", flush=True)

    def _kill_driver(self) -> str:
        assert self.driver is not None
        self.driver.kill()
        self.driver.wait()
        return f"driver {self.driver.pid}"

    def _kill_replica(self) -> str:
        return self._kill_process(lambda name: "Captioner" in name)

    def _kill_worker(self) -> str:
        # a raylet dies with its agents, and nobody would replace that node: nodes die as nodes
        return self._kill_process(
            lambda name: name.startswith("ray::") and not ("Captioner" in name or "Agent" in name)
        )

    def _kill_process(self, fits: Callable[[str], bool]) -> str:
        import psutil

        found = []
        for node in [self.cluster.head_node, *self.nodes]:
            raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
            for process in raylet.children(recursive=True):
                try:
                    name = " ".join(process.cmdline())
                except psutil.Error:
                    continue
                if fits(name):
                    found.append((process, name))
        if not found:
            return ""
        process, name = self.choose.choice(found)
        try:
            process.kill()
        except psutil.NoSuchProcess:
            return ""
        return f"{name[:60]} {process.pid}"

    def _kill_node(self) -> str:
        """-9 to a raylet and everything of its node; a new node joins a moment later, as a spot machine's successor
        does.
        """
        place = self.choose.randrange(len(self.nodes))
        raylet = self.nodes[place].all_processes["raylet"][0].process.pid
        os.kill(raylet, signal.SIGKILL)
        time.sleep(1)
        self.cluster.remove_node(self.nodes[place], allow_graceful=False)
        self.nodes[place] = self.cluster.add_node(**NODE)
        return f"raylet {raylet} and its node"


def records_of(directory: Path) -> tuple[dict[str, tuple[Any, ...]], int]:
    """id -> what is said of it, and how many rows have an id that another has too."""
    from pipelines.records import read_shards

    table = read_shards(directory, columns=["sample_id", "caption", "candidates", "recaption", "error"])
    rows = [tuple(map(str, row.values())) for row in table.to_pylist()]
    found = {row[0]: row for row in rows}
    return found, len(rows) - len(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--every", type=float, default=12.0, help="seconds between kills, on average")
    parser.add_argument("--minutes", type=float, default=6.0, help="no more kills after so long")
    parser.add_argument("--candidates", type=int, default=4, help="captions sampled of each image: how much work it is")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="where to write what was killed and what came out, as JSON")
    options = parser.parse_args()
    from tests.bench.bench_caption_scale import write_rows
    from tests.pipelines.tiny_blip2 import make_blip2

    with tempfile.TemporaryDirectory(prefix="captune-drill-") as name:
        place = Path(name)
        make_blip2(place / "blip2")
        write_rows(place / "data", options.rows, shard=2000)
        hunt = Hunt(place, options.candidates, options.seed)
        try:
            hunt.until_done("peace", lambda: time.sleep(0.2))
            peace = time.monotonic() - hunt.began
            hunt.began = time.monotonic()
            hunt.until_done("fire", lambda: hunt_once(hunt, options.every, 60 * options.minutes))
            fire = time.monotonic() - hunt.began
        finally:
            hunt.cluster.shutdown()
            shutil.rmtree(os.environ["RAY_TMPDIR"], ignore_errors=True)
        return verdict(place, hunt, options, peace, fire)


def hunt_once(hunt: Hunt, every: float, seconds: float) -> None:
    """Wait for a random time, or until the driver is through; then strike, for so many seconds."""
    until = time.monotonic() + hunt.choose.expovariate(1 / every)
    assert hunt.driver is not None
    while time.monotonic() < until:
        if hunt.driver.poll() is not None:
            return
        time.sleep(0.1)
    if time.monotonic() - hunt.began < seconds:
        hunt.strike("fire")


def verdict(place: Path, hunt: Hunt, options: argparse.Namespace, peace: float, fire: float) -> int:
    (quiet, _), (loud, doubled) = records_of(place / "peace"), records_of(place / "fire")
    lost, strange = quiet.keys() - loud.keys(), loud.keys() - quiet.keys()
    differ = [key for key in quiet.keys() & loud.keys() if quiet[key] != loud[key]]
    kinds = Counter(entry["kind"] for entry in hunt.killed if entry["kind"] in KINDS)
    manifest = json.loads((place / "fire" / "MANIFEST.json").read_text())
    result = {
        "rows": options.rows,
        "kills": dict(kinds),
        "lost": len(lost),
        "strange": len(strange),
        "doubled": doubled,
        "captions_that_differ": len(differ),
        "captioned": manifest["captioned"],
        "seconds": {"in_peace": round(peace), "under_fire": round(fire)},
    }
    print(json.dumps(result))
    if options.record:
        options.record.write_text(json.dumps({**result, "killed": hunt.killed}, indent=1))
    good = len(quiet) == len(loud) == options.rows and not (lost or strange or doubled or differ)
    print("every id exactly once, every caption the same" if good else "FAILED")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
