"""Make an MGM whose projector is fresh, from a language model and two towers."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # started by its path: the repository, not this folder, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from typing import Any

from jsonargparse import ArgumentParser, Namespace

from pipelines.errors import UserError
from pipelines.progress import say
from ray_jobs import _options, cli


def main(argv: list[str]) -> int:
    """`captune assemble --language-model DIR --clip DIR --openclip DIR --output DIR`, or `--from MGM_DIR`."""
    _, options = _options.parse("assemble", __doc__ or "", argv, _add_options)
    from pipelines.mgm.assemble import Geometry, assemble, assemble_from
    from pipelines.mgm.remote_code import add_remote_code

    output = Path(_options.required(options.output, "--output DIR", "assemble"))
    if options.source:
        given = [name for name in ("language_model", "clip", "openclip") if options[name]]
        if given:
            raise UserError(f"captune assemble --from takes all parts of one model; leave --{given[0]} out")
        config = assemble_from(Path(options.source), output, options.seed)
    else:
        language_model, clip, openclip = (
            Path(_options.required(options[name], f"--{name.replace('_', '-')} DIR", "assemble"))
            for name in ("language_model", "clip", "openclip")
        )
        config = assemble(language_model, clip, openclip, output, Geometry(**_given(options)))
    if options.remote_code:
        add_remote_code(output)
    say(
        f"assemble: {output} is an MGM with {config.text_config.model_type}, {config.num_image_tokens} tokens an image "
        "and a projector that has learned nothing; captune train aligns it"
    )
    return 0


def _given(options: Namespace) -> dict[str, Any]:
    """What was said of how the parts meet; the rest has its default where it is defined."""
    keys = ("projector", "image_size_aux", "image_grid", "image_global", "select_layer", "dtype", "seed")
    return {key: options[key] for key in keys if options[key] is not None}


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--language-model", type=str, help="directory of a Gemma, Llama, Mistral or Mixtral")
    parser.add_argument("--clip", type=str, help="directory of a CLIP")
    parser.add_argument("--openclip", type=str, help="directory of an OpenCLIP ConvNeXt")
    parser.add_argument("--from", dest="source", type=str, help="a finished MGM, instead of the three")
    parser.add_argument("--output", type=str, help="directory to write")
    parser.add_argument("--projector", type=str, help="linear, identity or mlp{N}x_gelu; default mlp2x_gelu")
    parser.add_argument("--image-size-aux", type=int, help="side of the image that feeds ConvNeXt; default 768")
    parser.add_argument("--image-grid", type=int, help="N cuts the image into N x N crops for CLIP; default 1")
    parser.add_argument("--image-global", action="store_true", help="with crops: the whole image's tokens, too")
    parser.add_argument("--select-layer", type=int, help="CLIP's hidden state that is used; default -2")
    parser.add_argument("--dtype", type=str, help="auto (the language model's), float32, bfloat16 or float16")
    parser.add_argument("--seed", type=int, default=0, help="of the fresh projector's weights")
    parser.add_argument("--remote-code", action="store_true", help="put the modelling code into the directory")


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
