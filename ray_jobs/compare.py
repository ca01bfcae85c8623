"""Hold evaluations against each other."""

from __future__ import annotations

if __name__ == "__main__":
    import _from_path  # noqa: F401

from pathlib import Path

from ray_jobs import _ending, cli
from ray_jobs._options import Command, Option, parse, writing

COMMAND = Command(
    "compare",
    "Hold evaluations against each other; the first is the baseline unless compare.baseline names one.",
    (
        Option("--evaluations", "DIR", "what captune evaluate wrote, two or more", path=True, needed=True, many=True),
        writing("directory for comparison.json"),
    ),
    reads=("compare",),
    first="--evaluations",
    example="captune compare runs/x/original/predictions/textvqa runs/x/enhanced/predictions/textvqa --output compared",
)


def main(argv: list[str]) -> int:
    """`captune compare DIR DIR [...] --output DIR`."""
    recipe, options = parse(COMMAND, argv)
    from dataclasses import replace

    from pipelines.errors import UserError
    from pipelines.evaluate import compare
    from pipelines.rundir import arm_of

    named = {arm_of(Path(path)): Path(path) for path in options.evaluations}
    if len(named) != len(options.evaluations):
        raise UserError("the evaluations' directories must have different names, because these name the arms")
    config = recipe.compare
    if config.baseline not in named:
        config = replace(config, baseline=next(iter(named)))
    found = compare.run(named, Path(options.output), config)
    lines = [sentence(config.baseline, name, found, difference) for name, difference in found["differences"].items()]
    return _ending.tell(options, found, "\n".join(lines))


def sentence(baseline: str, arm: str, found: dict, difference: dict) -> str:
    """The result in words."""
    low, high = (100 * value for value in difference["interval"])
    return (
        f"{arm} {100 * found['arms'][arm]['accuracy']:.1f} %, {baseline} "
        f"{100 * found['arms'][baseline]['accuracy']:.1f} %: "
        f"difference {100 * difference['difference']:+.1f} points, "
        f"{100 * found['confidence']:.0f} % interval {low:+.1f} to {high:+.1f}, McNemar p = "
        f"{difference['mcnemar']['p_value']:.2g}"
    )


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
