"""Turn an original MGM checkpoint into a Hugging Face directory."""

from __future__ import annotations

if __name__ == "__main__":
    import _from_path  # noqa: F401

from ray_jobs import _ending, cli
from ray_jobs._options import Command, Option, parse, reading, writing

COMMAND = Command(
    "convert",
    "Turn an original MGM checkpoint into a Hugging Face directory.",
    (
        reading("original checkpoint", "--checkpoint"),
        writing(),
        Option("--clip", "DIR", "CLIP tower, when the checkpoint does not hold it", path=True),
        Option("--openclip", "DIR", "OpenCLIP ConvNeXt, likewise", path=True),
        Option(
            "--remote-code", about="put the modelling code in: it then loads without captune (trust_remote_code=True)"
        ),
    ),
    first="--checkpoint",
    example="captune convert MGM-2B --clip clip-vit-large-patch14-336 --openclip convnext --output models/mgm-2b",
)


def main(argv: list[str]) -> int:
    """`captune convert DIR --output DIR [--clip DIR] [--openclip DIR] [--remote-code]`."""
    _, options = parse(COMMAND, argv)
    from pipelines.mgm.convert import convert_checkpoint
    from pipelines.mgm.remote_code import add_remote_code

    config = convert_checkpoint(options.checkpoint, options.output, clip=options.clip, openclip=options.openclip)
    if options.remote_code:
        add_remote_code(options.output)
    facts = {"language_model": config.text_config.model_type, "tokens_per_image": config.num_image_tokens}
    made = f"convert: an MGM with {config.text_config.model_type}, {config.num_image_tokens} tokens an image, in {{}}"
    facts["output"] = options.output
    return _ending.end(options, facts, made.format(options.output), "captune", "check", options.output)


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
