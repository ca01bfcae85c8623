"""Make an MGM whose projector is fresh, from a language model and two towers."""

from __future__ import annotations

if __name__ == "__main__":
    import _from_path  # noqa: F401

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipelines.errors import UserError
from ray_jobs import _ending, cli
from ray_jobs._options import Command, Option, parse, required, writing

COMMAND = Command(
    "assemble",
    "Make an MGM whose projector is fresh, from a language model and two towers, or from the parts of a finished MGM.",
    (
        Option("--language-model", "DIR", "Gemma, Llama, Mistral or Mixtral", path=True),
        Option("--clip", "DIR", "CLIP", path=True),
        Option("--openclip", "DIR", "OpenCLIP ConvNeXt", path=True),
        Option("--from", "DIR", "a finished MGM, instead of the three", path=True),
        writing(),
        Option("--projector", "KIND", "linear, identity or mlp{N}x_gelu; else mlp2x_gelu"),
        Option("--image-size-aux", "PIXELS", "side of the image that feeds ConvNeXt; else 768", number=True),
        Option("--image-grid", "N", "cut the image into N x N crops for CLIP; else 1", number=True),
        Option("--image-global", about="with crops: the whole image's tokens, too"),
        Option("--select-layer", "N", "CLIP's hidden state that is used; else -2", number=True),
        Option("--dtype", "DTYPE", "of the model", choices=("auto", "float32", "bfloat16", "float16")),
        Option("--seed", "N", "of the fresh projector's weights", number=True, default=0),
        Option("--remote-code", about="put the modelling code into the directory"),
    ),
    example="captune assemble --language-model gemma-2b --clip clip-large --openclip convnext --output models/fresh",
)


def main(argv: list[str]) -> int:
    """`captune assemble --language-model DIR --clip DIR --openclip DIR --output DIR`, or `--from MGM_DIR`."""
    _, options = parse(COMMAND, argv)
    from pipelines.mgm.assemble import Geometry, assemble, assemble_from
    from pipelines.mgm.remote_code import add_remote_code

    output, parts = Path(options.output), ("language_model", "clip", "openclip")
    if options.from_:
        given = [name for name in parts if getattr(options, name)]
        if given:
            raise UserError(f"captune assemble --from takes all parts of one model; leave --{given[0]} out")
        config = assemble_from(Path(options.from_), output, options.seed)
    else:
        language_model, clip, openclip = (
            Path(required(getattr(options, name), f"--{name.replace('_', '-')} DIR", "assemble")) for name in parts
        )
        config = assemble(language_model, clip, openclip, output, Geometry(**_given(options)))
    if options.remote_code:
        add_remote_code(output)
    facts = {"language_model": config.text_config.model_type, "tokens_per_image": config.num_image_tokens}
    made = (
        f"assemble: an MGM with {facts['language_model']}, {facts['tokens_per_image']} tokens an image and a projector "
        f"that has learned nothing, in {output}"
    )
    following = ("captune", "train", "DATASET", "--model", str(output), "--output", "DIR")
    return _ending.end(options, {**facts, "output": str(output)}, made, *following)


def _given(options: SimpleNamespace) -> dict[str, Any]:
    """What was said of how the parts meet; the rest has its default where it is defined."""
    keys = ("projector", "image_size_aux", "image_grid", "image_global", "select_layer", "dtype", "seed")
    found = vars(options)
    return {key: found[key] for key in keys if found[key] is not None}


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
