"""Turn an original MGM checkpoint into a Hugging Face directory."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # started by its path: the repository, not this folder, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ray_jobs import _options, cli


def main(argv: list[str]) -> int:
    """`captune convert --checkpoint DIR --output DIR [--clip DIR] [--openclip DIR] [--remote-code]`."""
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
            parser.add_argument(
                "--remote-code",
                action="store_true",
                help="put the modelling code into the directory: it then loads without captune "
                "(trust_remote_code=True)",
            ),
        ),
    )
    from pipelines.mgm.convert import convert_checkpoint
    from pipelines.mgm.remote_code import add_remote_code
    from pipelines.progress import say

    output = _options.required(options.output, "--output DIR", "convert")
    config = convert_checkpoint(
        _options.required(options.checkpoint, "--checkpoint DIR", "convert"),
        output,
        clip=options.clip,
        openclip=options.openclip,
    )
    if options.remote_code:
        add_remote_code(output)
    say(f"convert: {output} is an MGM with {config.text_config.model_type}, {config.num_image_tokens} tokens an image")
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
