"""Turn the original trainer's LoRA output into an adapter that captune merges."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # started by its path: the repository, not this folder, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ray_jobs import _options, cli


def main(argv: list[str]) -> int:
    """`captune convert-lora --adapter DIR --model DIR --output DIR`."""
    _, options = _options.parse(
        "convert-lora",
        __doc__ or "",
        argv,
        lambda parser: (
            parser.add_argument(
                "--adapter", type=str, help="adapter_model and non_lora_trainables.bin of the original's trainer"
            ),
            parser.add_argument("--model", type=str, help="converted base model"),
            parser.add_argument("--output", type=str, help="directory to write"),
        ),
    )
    from pipelines.mgm.convert_lora import convert_lora

    convert_lora(
        _options.required(options.adapter, "--adapter DIR", "convert-lora"),
        _options.required(options.model, "--model DIR", "convert-lora"),
        _options.required(options.output, "--output DIR", "convert-lora"),
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
