"""A table over runs: what each tried, how far it is, what it found and what it cost."""

from __future__ import annotations

if __name__ == "__main__":
    import _from_path  # noqa: F401

from pathlib import Path

from pipelines.files import write_text
from ray_jobs import _ending, cli
from ray_jobs._options import Command, Option, parse

COMMAND = Command(
    "runs",
    "List runs: data, arms, result with its interval, hours. DIR is a run or holds some; `runs` when none is named.",
    (
        Option("--directories", "DIR", "run directories, or what holds them", many=True),
        Option("--page", "FILE", "an HTML page to write instead of a table", path=True),
    ),
    first="--directories",
    example="captune runs runs /shared/runs --page runs/index.html",
)


def main(argv: list[str]) -> int:
    """`captune runs [DIR ...]`."""
    _, options = parse(COMMAND, argv)
    from pipelines.report import runs

    found = runs.rows([Path(name).expanduser() for name in options.directories or ["runs"]])
    if options.page:
        path = Path(options.page)
        write_text(path, runs.page(found, path.parent))
        return _ending.tell(options, runs.as_json(found), str(path))
    return _ending.tell(options, runs.as_json(found), runs.table(found))


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
