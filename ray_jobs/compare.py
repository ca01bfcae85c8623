"""Hold evaluations against each other."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # started by its path: the repository, not this folder, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ray_jobs import _options, cli


def main(argv: list[str]) -> int:
    """`captune compare DIR DIR [...] --output DIR`: the first directory is the baseline unless compare.baseline names
    one.
    """
    recipe, options = _options.parse(
        "compare",
        __doc__ or "",
        argv,
        lambda parser: (
            parser.add_argument("evaluations", type=str, nargs="+", help="directories that captune evaluate wrote"),
            parser.add_argument("--output", type=str, help="directory to write comparison.json to"),
        ),
    )
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
    found = compare.run(named, Path(_options.required(options.output, "--output DIR", "compare")), config)
    for name, difference in found["differences"].items():
        print(sentence(config.baseline, name, found, difference))
    return 0


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
