"""Check a model, or an adapter against its base."""

from __future__ import annotations

if __name__ == "__main__":
    import _from_path  # noqa: F401

from dataclasses import asdict

from ray_jobs import _ending, cli
from ray_jobs._options import Command, Option, parse, reading

COMMAND = Command(
    "check",
    "Check a model, or an adapter against its base; a verdict per check, and exit status 1 when one fails.",
    (
        reading("model; with --adapter its base", "--model"),
        Option("--adapter", "DIR", "what captune train wrote", path=True),
    ),
    first="--model",
    example="captune check runs/sample/enhanced/merged",
)


def main(argv: list[str]) -> int:
    """`captune check DIR [--adapter DIR]`: exit status 1 when a check fails."""
    _, options = parse(COMMAND, argv)
    from pipelines.adapters.check import check_adapter, check_model

    verdicts = check_adapter(options.adapter, options.model) if options.adapter else check_model(options.model)
    lines = [f"{'ok  ' if verdict.passed else 'FAIL'}  {verdict.name}: {verdict.detail}" for verdict in verdicts]
    _ending.tell(options, [asdict(verdict) for verdict in verdicts], "\n".join(lines))
    return 0 if all(verdict.passed for verdict in verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
