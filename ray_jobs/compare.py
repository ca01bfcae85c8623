"""Hold evaluations against each other."""

from __future__ import annotations

if __name__ == "__main__":
    import _from_path  # noqa: F401

from pathlib import Path

from pipelines.errors import UserError
from pipelines.progress import say
from pipelines.rundir import arm_of
from ray_jobs import _ending, cli
from ray_jobs._options import Command, Option, parse, writing

COMMAND = Command(
    "compare",
    "Hold evaluations against each other; the baseline is compare.baseline, else `original`, else the first.",
    (
        Option("--evaluations", "[NAME=]DIR", "what captune evaluate wrote, two or more", needed=True, many=True),
        writing("directory for comparison.json"),
    ),
    reads=("compare",),
    first="--evaluations",
    example="captune compare original=runs/x/a new=runs/x/b --output compared",
)


def main(argv: list[str]) -> int:
    """`captune compare [NAME=]DIR [NAME=]DIR [...] --output DIR`; status 1 when failed requests forbid a verdict."""
    recipe, options = parse(COMMAND, argv)
    from pipelines.evaluate import compare

    found = compare.run(_named(options.evaluations), Path(options.output), recipe.compare)
    _ending.tell(options, found, "\n".join(compare.sentence(found, arm) for arm in found["differences"]))
    reasons = compare.withheld(found)
    for reason in reasons:
        say(f"captune: failed: {reason}")
    return 1 if reasons else 0


def _named(arguments: list[str]) -> dict[str, Path]:
    """Arm -> directory: named by `NAME=` before it, else as the layout of a run says."""
    named: dict[str, Path] = {}
    for argument in arguments:
        name, given, directory = argument.partition("=")
        if not given or "/" in name or Path(argument).exists():  # a directory that has such a character itself
            name, directory = "", argument
        place = Path(directory).expanduser()
        name = name or arm_of(place)
        if name in named:
            raise UserError(f"two evaluations are named '{name}'; give them names of their own: NAME=DIR")
        named[name] = place
    return named


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
