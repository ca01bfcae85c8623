"""Draw the HTML report of a run directory."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # started by its path: the repository, not this folder, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ray_jobs import _options, cli


def main(argv: list[str]) -> int:
    """`captune report --run_dir DIR`."""
    recipe, _ = _options.parse("report", __doc__ or "", argv)
    from pipelines.report import page

    print(page.run(Path(recipe.run_dir)))
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
