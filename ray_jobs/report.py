"""Draw the HTML report of a run directory."""

from __future__ import annotations

if __name__ == "__main__":
    import _from_path  # noqa: F401

from pathlib import Path

from ray_jobs import _ending, cli
from ray_jobs._options import Command, parse, reading

COMMAND = Command(
    "report",
    "Draw the HTML report of a run directory, finished or not.",
    (reading("run directory", "--run_dir", "RUN", key="run_dir"),),
    reads=("run_dir",),
    first="--run_dir",
    example="captune report runs/sample",
)


def main(argv: list[str]) -> int:
    """`captune report RUN`."""
    recipe, options = parse(COMMAND, argv)
    from pipelines.report import page

    path = page.run(Path(recipe.run_dir))
    return _ending.tell(options, {"report": str(path)}, str(path))


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
