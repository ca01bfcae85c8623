"""Turn an original MGM checkpoint into a Hugging Face directory."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # started by its path: the repository, not this folder, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ray_jobs import _options, cli


def main(argv: list[str]) -> int:
    """`captune convert --checkpoint DIR --output DIR [--clip DIR] [--openclip DIR]`."""
    _, options = _options.parse(
        "convert",
        __doc__ or "",
        argv,
        lambda parser: (
            parser.add_argument("--checkpoint", type=str, help="original checkpoint directory"),
            parser.add_argument("--output", type=str, help="directory to write"),
            parser.add_argument(
                "--clip", type=str, help="CLIP tower's directory, when the checkpoint does not hold it"
            ),
            parser.add_argument("--openclip", type=str, help="OpenCLIP ConvNeXt's directory, likewise"),
        ),
    )
    from pipelines.mgm.convert import convert_checkpoint

    convert_checkpoint(
        _options.required(options.checkpoint, "--checkpoint DIR", "convert"),
        _options.required(options.output, "--output DIR", "convert"),
        clip=options.clip,
        openclip=options.openclip,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
