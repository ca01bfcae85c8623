"""Hold evaluations against each other."""

from __future__ import annotations

if __name__ == "__main__":
    import _from_path  # noqa: F401

from collections.abc import Iterator
from pathlib import Path

from pipelines.errors import UserError
from pipelines.progress import say
from pipelines.rundir import RunDir, arm_of, collect
from ray_jobs import _ending, cli
from ray_jobs._options import Command, Option, parse, writing

COMMAND = Command(
    "compare",
    "Hold evaluations against each other; the baseline is compare.baseline, else `original`, else the first.",
    (
        Option("--evaluations", "[NAME=]DIR", "what captune evaluate wrote, or runs", needed=True, many=True),
        writing("directory for comparison.json"),
        Option("--benchmark", "NAME", "of runs that were asked several: which; else the first of their recipe"),
    ),
    reads=("compare",),
    first="--evaluations",
    example="captune compare original=runs/x/a new=runs/x/b --output compared",
)


def main(argv: list[str]) -> int:
    """`captune compare [NAME=]DIR [NAME=]DIR [...] --output DIR`; status 1 when failed requests forbid a verdict."""
    recipe, options = parse(COMMAND, argv)
    from pipelines.evaluate import compare

    found = compare.run(_named(options.evaluations, options.benchmark or ""), Path(options.output), recipe.compare)
    _ending.tell(options, found, "\n".join(compare.sentence(found, arm) for arm in found["differences"]))
    reasons = compare.withheld(found)
    for reason in reasons:
        say(f"captune: failed: {reason}")
    return 1 if reasons else 0


def _named(arguments: list[str], benchmark: str) -> dict[str, Path]:
    """Arm -> directory: named by `NAME=` before it, else as the layout of a run says."""
    named: dict[str, Path] = {}
    for argument in arguments:
        name, given, directory = argument.partition("=")
        if not given or "/" in name or Path(argument).exists():  # a directory that has such a character itself
            name, directory = "", argument
        place = Path(directory).expanduser()
        for own, evaluation in _evaluations(place, name, benchmark):
            if own in named:
                raise UserError(f"two evaluations are named '{own}'; give them names of their own: NAME=DIR")
            named[own] = evaluation
    return named


def _evaluations(place: Path, name: str, benchmark: str) -> Iterator[tuple[str, Path]]:
    """An evaluation, or all of a run on one benchmark, named after it and their arms."""
    if not RunDir(place).recipe.is_file():
        yield name or arm_of(place), place
        return
    run = collect(place)
    wanted = benchmark or str((run.recipe.get("evaluate") or {}).get("benchmark"))
    for walk in run.walks:
        if walk.evaluations and wanted not in walk.evaluations:
            asked = ", ".join(walk.evaluations)
            raise UserError(f"{place}: {walk.name} was asked {asked}, and not '{wanted}' (--benchmark says which)")
        if walk.evaluations:
            yield f"{name or run.directory.name}/{walk.name}", walk.evaluations[wanted].directory


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
