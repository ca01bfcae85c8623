"""Everything captune does on a GPU, measured by one command: captions, training, answering, against their references.

python tests/bench/gpu.py --out DIR [--budget 440] [--only captions training ...]   # on a card; nothing is downloaded
python tests/bench/gpu.py --out DIR --tiny                                          # all of it on a CPU, with toys

Each figure is a line of `DIR/gpu.jsonl` as soon as it is known, the most valuable first, and equality with a reference
comes before any speed; `DIR/kernels.txt` has the kernels behind them. What fails, and what finds no time, is a line,
too. Models have the true geometry and random weights, which changes no shape, so no time. Results: `GPU.md`.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository: on a bare machine nothing is installed

from gpu_sections.answering import answering
from gpu_sections.captions import FP8, Captions
from gpu_sections.ceilings import ceilings
from gpu_sections.kernels import kernels
from gpu_sections.run import Run
from gpu_sections.stage import stage
from gpu_sections.training import training

SECTIONS = ("ceilings", "captions", "fp8", "stage", "training", "answering")


def main(arguments: list[str] | None = None) -> None:
    """Measure, in the order of worth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=440, help="seconds")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--tiny", action="store_true", help="toy models on the CPU")
    args = parser.parse_args(arguments)
    run = Run(args.out, args.budget, args.tiny)
    if "ceilings" in args.only:
        run.section("ceilings", 5, ceilings)
    if {"captions", "fp8", "stage"} & set(args.only):
        captions(run, args.only, args.out)
    if "answering" in args.only:
        run.section("answering", 30, answering)
    if "training" in args.only:
        run.section("training", 30, training)
    run.note("end", seconds_left=run.left())


def captions(run: Run, only: tuple[str, ...], out: Path) -> None:
    """BLIP-2's sections, which share a model."""
    bench = Captions(run)
    slots = bench.slots
    if "captions" in only:
        run.section("kernels", 20, kernels)
        run.section("captions.equal", 20, bench.equal)
        for count, mixed in ((slots, False), (slots, True), (2 * slots, False), (2 * slots, True)):
            run.section("captions.engine", 15, partial(bench.rate, slots=count, mixed=mixed))
        run.section("captions.parts", 15, bench.parts)
        run.section("captions.generate", 25, partial(bench.plain, batch=slots, mixed=True))
    if "fp8" in only:
        run.section("captions.fp8", 20, bench.fp8)
        run.section("captions.fp8.parts", 15, partial(bench.parts, **FP8))
    if "stage" in only:
        run.section("stage", 90, partial(stage, captions=bench, out=out))


if __name__ == "__main__":
    main()
