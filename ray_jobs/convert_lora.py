"""Turn the original trainer's LoRA output into an adapter."""

from __future__ import annotations

if __name__ == "__main__":
    import _from_path  # noqa: F401

from ray_jobs import _ending, cli
from ray_jobs._options import Command, Option, parse, reading, writing

COMMAND = Command(
    "convert-lora",
    "Turn the original trainer's LoRA output into an adapter.",
    (
        reading("adapter_model and non_lora_trainables.bin of the original's trainer", "--adapter"),
        Option("--model", "DIR", "converted base model", path=True, needed=True),
        writing(),
    ),
    first="--adapter",
    example="captune convert-lora mgm-2b-lora --model models/mgm-2b --output adapter",
)


def main(argv: list[str]) -> int:
    """`captune convert-lora DIR --model DIR --output DIR`."""
    _, options = parse(COMMAND, argv)
    from pipelines.mgm.convert_lora import convert_lora

    convert_lora(options.adapter, options.model, options.output)
    following = ("captune", "merge", options.output, "--model", options.model, "--output", "DIR")
    return _ending.end(
        options, {"output": options.output}, f"convert-lora: an adapter, in {options.output}", *following
    )


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
