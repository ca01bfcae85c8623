"""Kill `captune run` on the sample with two arms, -9 in every stage of both; the run that is left alone at last must
have the scores of an undisturbed one.

    python tests/drills/drill_run_kills.py --undisturbed OTHER/comparison.json

About a minute a kill on top of the run itself. Without `--undisturbed` that run is made first. The arms go side by
side, so that a kill meets both, and some moments are over before they are waited for.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
TWO_ARMS = """base: sample
arms:
  original: {text: caption}
  enhanced: {text: recaption, recipe: refine_captions.yaml}
"""
MOMENTS = {
    "drawing the sample": (r"ray: started", 1.0),
    "reading the dataset": (r"caption: reading", 0.2),
    "loading the captioner": (r"caption: 0/\d+ images", 5.0),
    "captioning": (r"caption: .*captioning|caption: [1-9]", 0.5),
    "refining": (r"refine enhanced: error", 0.1),
    "starting to train": (r"train original: .*starting workers", 8.0),
    "aligning (original)": (r"train original: .*align, loss", 6.0),
    "instructing (original)": (r"train original: .*instruct, loss", 5.0),
    "merging (original)": (r"merge: /", 0.5),
    "starting to serve (original)": (r"evaluate original, textvqa: 0/", 0.0),
    "evaluating (original)": (r"evaluate original, textvqa: [1-9]", 0.0),
    "aligning (enhanced)": (r"train enhanced: .*align, loss", 6.0),
    "instructing (enhanced)": (r"train enhanced: .*instruct, loss", 5.0),
    "merging (enhanced)": (r"merge: .*enhanced", 0.2),
    "evaluating (enhanced)": (r"evaluate enhanced, textvqa: [1-9]", 0.0),
    "reporting": (r"enhanced .*points", 0.0),
}
"""What is going on -> a line of the log that says so, and seconds to wait after it."""


def main() -> int:
    """Run the drill; 1 when the scores differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--undisturbed", type=Path, help="comparison.json of an undisturbed run of the recipe")
    parser.add_argument("--out", type=Path, default=Path("runs/drill"), help="where the runs go")
    options = parser.parse_args()
    undisturbed = options.undisturbed
    if undisturbed is None:
        print("undisturbed run ...", flush=True)
        undisturbed = options.out / "undisturbed" / "comparison.json"
        Run(options.out / "undisturbed").to_the_end()
    place = options.out / "killed"
    shutil.rmtree(place, ignore_errors=True)
    started, kills = time.monotonic(), 0
    for moment, (sign, delay) in MOMENTS.items():
        seconds = Run(place).kill_at(sign, delay)
        kills += seconds is not None
        outcome = "over before it could be killed" if seconds is None else f"killed after {seconds:4.0f} s"
        print(f"{moment:32} {outcome}", flush=True)
    Run(place).to_the_end()
    print(f"{kills} kills, finished after {time.monotonic() - started:.0f} s")
    return compare(undisturbed, place / "comparison.json")


class Run:
    """One start of the recipe in a directory of its own, with its world inside."""

    def __init__(self, place: Path) -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        recipe = place.parent / f"{place.name}.yaml"
        recipe.write_text(TWO_ARMS)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ray_jobs.cli", "run", str(recipe), "--run_dir", str(place)],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
        )  # fmt: skip
        self.lines: list[str] = []
        self.changed = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self.changed:
                self.lines.append(line)
                self.changed.notify_all()
        with self.changed:
            self.changed.notify_all()

    def kill_at(self, sign: str, delay: float) -> float | None:
        """`kill -9` some seconds after a line that matches; seconds it lived, or None when it ended by itself
        before.
        """
        started, seen = time.monotonic(), 0
        while True:
            with self.changed:
                fresh, seen = self.lines[seen:], len(self.lines)
                if any(re.search(sign, line) for line in fresh):
                    break
                if not fresh:
                    if self.process.poll() is not None:
                        return self._ended()
                    self.changed.wait(1)
        time.sleep(delay)
        if self.process.poll() is not None:
            return self._ended()
        self.process.kill()
        self.process.wait()
        return time.monotonic() - started

    def to_the_end(self) -> None:
        """Wait for a run that nobody disturbs."""
        self.process.wait()
        self._ended()

    def _ended(self) -> None:
        assert self.process.returncode == 0, "".join(self.lines[-40:])


def compare(undisturbed: Path, killed: Path) -> int:
    """Print both runs' scores; 1 when they differ."""
    found = [json.loads(path.read_text()) for path in (undisturbed, killed)]
    for name, comparison in zip(("undisturbed", "killed"), found, strict=True):
        scores = ", ".join(
            f"{arm} {facts['accuracy']:.2%} (model {facts['model']})" for arm, facts in comparison["arms"].items()
        )
        print(f"{name:12} {scores}")
    same = all(found[0][key] == found[1][key] for key in ("arms", "differences"))
    print("the same scores" if same else "DIFFERENT SCORES")
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
