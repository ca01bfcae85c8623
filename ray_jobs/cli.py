"""The `captune` command: maps a command to the entrypoint of the same name and ends with the contract's exit status.

Nothing heavy is imported here: `captune --help` answers at once, and a wrong key is refused before any model loads.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

from pipelines.errors import UserError, WorkFailed

COMMANDS = {
    "run": "walk the whole hallway for every arm of a recipe",
    "sample": "draw the embedded sample world",
    "caption": "recaption an image-text dataset with BLIP-2",
    "refine": "choose and clean captions with a Data-Juicer recipe",
    "export": "write kept records in another dataset format",
    "stats": "quality metrics of a dataset's captions",
    "train": "align the projector, then LoRA-tune the language model",
    "merge": "merge an adapter into its base model",
    "check": "check a model or an adapter",
    "assemble": "make an MGM with a fresh projector from its parts",
    "convert": "turn an original MGM checkpoint into a Hugging Face directory",
    "export-original": "turn it back, bit for bit",
    "convert-lora": "turn the original trainer's LoRA output into an adapter",
    "serve": "answer over HTTP, OpenAI-compatible, in batches",
    "evaluate": "ask a model the questions of a benchmark",
    "score": "score answers made elsewhere",
    "compare": "hold evaluations against each other",
    "report": "draw the HTML report of a run directory",
    "k8s": "render Kubernetes manifests for a recipe",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if argv[0] in ("-V", "--version"):
        from pipelines import __version__

        print(f"captune {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        print(f"captune: error: there is no command '{argv[0]}'{hint} (captune --help lists them)", file=sys.stderr)
        return 2
    room = "k8s.command" if argv[0] == "k8s" else f"ray_jobs.{argv[0].replace('-', '_')}"
    module = importlib.import_module(room)
    return guarded(module.main, argv[1:])


def guarded(work: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Run an entrypoint; its errors become one line on standard error and the exit status of the contract."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return work(argv) or 0
    except UserError as error:
        print(f"captune: error: {error}", file=sys.stderr)
        return 2
    except WorkFailed as error:
        print(f"captune: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("captune: stopped; the same command continues", file=sys.stderr)
        return 130


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    return (
        "usage: captune COMMAND [options]\n\n"
        f"{lines}\n\n"
        "captune COMMAND --help lists a command's options; every option is also a key of a recipe (--config "
        "RECIPE.yaml)."
    )


if __name__ == "__main__":
    raise SystemExit(main())
