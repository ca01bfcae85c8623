"""Does `captune forecast` come true? The sample (or another recipe) in small and as a whole, with as many seeds.

    .venv/bin/python tests/bench/bench_forecast.py runs/bench_forecast --seeds 10 [-- --train.align.steps 80 ...]

For every seed the gain is foretold from that seed's own rungs, and held against what the whole run with that seed
measured; the 90 % interval should hold it in nine of ten. Both commands continue where they were killed. What stands
behind `--` goes to both. Ten seeds of the sample take some three hours on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from pipelines.ladder.law import Point, extrapolate

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--recipe", default="sample")
    parser.add_argument("more", nargs="*", help="options of both commands")
    asked = parser.parse_args()
    seeds = list(range(asked.seeds))
    words = [asked.recipe, "--run_dir", str(asked.run_dir), "--seeds", json.dumps(seeds), *asked.more]
    for command in ("forecast", "run"):
        subprocess.run([sys.executable, "-m", "ray_jobs.cli", command, *words], cwd=ROOT, check=True)
    rows = held_against(asked.run_dir)
    for row in rows:
        low, high = row["interval"]
        print(
            f"seed {row['seed']} {row['arm']}: foretold {100 * row['foretold']:+.1f} ({100 * low:+.1f} to "
            f"{100 * high:+.1f}), measured {100 * row['measured']:+.1f}{'' if row['held'] else '  missed'}"
        )
    held = sum(row["held"] for row in rows)
    print(json.dumps({"held": held, "of": len(rows), "rows": rows}))


def held_against(run_dir: Path) -> list[dict[str, Any]]:
    """For every seed and arm: the gain foretold from that seed's rungs alone, and the whole run's."""
    found = json.loads((run_dir / "forecast" / "forecast.json").read_text())
    comparison = json.loads((run_dir / "comparison.json").read_text())
    known = {field.name for field in fields(Point)}
    points = [Point(**{key: value for key, value in each.items() if key in known}) for each in found["points"]]
    measured = comparison.get("seeds") or [{**comparison, "seed": found["seeds"][0]}]
    rows = []
    for whole in measured:
        mine = [point for point in points if point.seed == whole["seed"]]
        foretold = extrapolate(mine, found["baseline"], found["confidence"], 0)["arms"]
        for arm, difference in whole["differences"].items():
            gain = foretold[arm]["gain"]
            low, high = gain["interval"]
            row = {"seed": whole["seed"], "arm": arm, "foretold": gain["value"], "interval": gain["interval"]}
            rows.append(row | {"measured": difference["difference"], "held": low <= difference["difference"] <= high})
    return rows


if __name__ == "__main__":
    main()
