"""Make an MGM whose projector is fresh, from a language model and two towers."""

from __future__ import annotations

if __name__ == "__main__":
    import _from_path  # noqa: F401

from pathlib import Path

from pipelines import preflight
from ray_jobs import _ending, cli
from ray_jobs._options import RESTART, Command, Option, parse

_MEET = (
    ("projector", "KIND", "linear, identity or mlp{N}x_gelu; else mlp2x_gelu"),
    ("image_size_aux", "PIXELS", "side of the image that feeds ConvNeXt; else 768"),
    ("image_grid", "N", "cut the image into N x N crops for CLIP; else 1"),
    ("image_global", "", "with crops: the whole image's tokens, too"),
    ("select_layer", "N", "CLIP's hidden state that is used; else -2"),
    ("dtype", "DTYPE", "of the model: auto, float32, bfloat16 or float16"),
    ("seed", "N", "of the fresh projector's weights"),
)
"""How the parts meet: other names of keys of the section `assemble`."""
COMMAND = Command(
    "assemble",
    "Make an MGM whose projector is fresh, from a language model and two towers, or from the parts of a finished MGM.",
    (
        Option("--language-model", "DIR", "Gemma, Llama, Mistral or Mixtral", key="assemble.language_model", path=True),
        Option("--clip", "DIR", "CLIP", key="assemble.clip", path=True),
        Option("--openclip", "DIR", "OpenCLIP ConvNeXt", key="assemble.openclip", path=True),
        Option("--from", "DIR", "a finished MGM, instead of the three", key="assemble.from_mgm", path=True),
        Option("--output", "DIR", "directory to write", key="train.model", path=True, writes=True, needed=True),
        *(Option(f"--{name.replace('_', '-')}", value, about, key=f"assemble.{name}") for name, value, about in _MEET),
        Option("--remote-code", about="put the modelling code into the directory"),
        RESTART,
    ),
    reads=("assemble", "train.model"),
    example="captune assemble --language-model gemma-2b --clip clip-large --openclip convnext --output models/fresh",
)


def main(argv: list[str]) -> int:
    """`captune assemble --language-model DIR --clip DIR --openclip DIR --output DIR`, or `--from MGM_DIR`."""
    recipe, options = parse(COMMAND, argv)
    preflight.require([*preflight.assemble(recipe.assemble), *preflight.output(options.output)])
    from pipelines.mgm.assemble import run
    from pipelines.mgm.remote_code import add_remote_code

    facts = run(recipe.assemble, options.output, restart=options.restart)
    if options.remote_code:
        add_remote_code(Path(options.output))
    made = (
        f"assemble: an MGM with {facts['language_model']}, {facts['tokens_per_image']} tokens an image and a projector "
        f"that has learned nothing, in {options.output}"
    )
    following = ("captune", "train", "DATASET", "--model", options.output, "--output", "DIR")
    return _ending.end(options, facts, made, *following)


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
