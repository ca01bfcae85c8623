"""The `captune` command: maps a command to the entrypoint of the same name and ends with the contract's exit status.

Nothing heavy is imported here: `captune --help` answers at once, and a wrong key is refused before any model loads.
"""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import NamedTuple

from pipelines import lock
from pipelines.errors import UserError, WorkFailed

_ASKED = (
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EROFS),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL),
)
"""What the system refuses because of what was asked for; the rest happens to the work."""


class Entry(NamedTuple):
    """Where a command's `main` is, and what it does in a few words."""

    room: str
    about: str


COMMANDS = {
    "run": Entry("ray_jobs.run", "walk the whole hallway for every arm of a recipe"),
    "init": Entry("ray_jobs.init", "write a recipe for the data, models and machine at hand"),
    "sample": Entry("ray_jobs.sample", "draw the embedded sample world"),
    "caption": Entry("ray_jobs.caption", "recaption an image-text dataset with BLIP-2"),
    "analyze": Entry("ray_jobs.analyze", "what filters measure in a dataset, and bounds for them"),
    "refine": Entry("ray_jobs.refine", "choose and clean captions with a Data-Juicer recipe"),
    "export": Entry("ray_jobs.export", "write kept records in another dataset format"),
    "stats": Entry("ray_jobs.stats", "quality metrics of a dataset's captions"),
    "train": Entry("ray_jobs.train", "align the projector, then LoRA-tune the language model"),
    "merge": Entry("ray_jobs.merge", "merge an adapter into its base model"),
    "check": Entry("ray_jobs.check", "check a model or an adapter"),
    "assemble": Entry("ray_jobs.assemble", "make an MGM with a fresh projector from its parts"),
    "convert": Entry("ray_jobs.convert", "turn an original MGM checkpoint into a Hugging Face directory"),
    "export-original": Entry("ray_jobs.export_original", "turn it back, bit for bit"),
    "convert-lora": Entry("ray_jobs.convert_lora", "turn the original trainer's LoRA output into an adapter"),
    "serve": Entry("ray_jobs.serve", "answer over HTTP, OpenAI-compatible, in batches"),
    "evaluate": Entry("ray_jobs.evaluate", "ask a model the questions of a benchmark"),
    "score": Entry("ray_jobs.score", "score answers made elsewhere"),
    "compare": Entry("ray_jobs.compare", "hold evaluations against each other"),
    "forecast": Entry("ray_jobs.forecast", "foretell a recipe's gain and hours from a part of its rows"),
    "explain": Entry("ray_jobs.explain", "split a gain over its causes: captions, each filter"),
    "overlap": Entry("ray_jobs.overlap", "what training data and a benchmark have in common"),
    "report": Entry("ray_jobs.report", "draw the HTML report of a run directory"),
    "runs": Entry("ray_jobs.runs", "list runs: data, result, cost"),
    "k8s": Entry("k8s.command", "run a recipe on Kubernetes; what a cluster lacks; manifests"),
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
    return guarded(importlib.import_module(COMMANDS[argv[0]].room).main, argv[1:])


def guarded(work: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Run an entrypoint; its errors become one line on standard error and the exit status of the contract."""
    argv = sys.argv[1:] if argv is None else argv
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        return work(argv) or 0
    except UserError as error:
        print(f"captune: error: {error}", file=sys.stderr)
        return 2
    except WorkFailed as error:
        print(f"captune: failed: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `captune stats X | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except OSError as error:
        return _refused_by_the_system(error)
    except Exception as error:  # Ray's errors among them: a worker's, wrapped
        if (known := _of_a_worker(error)) is None:
            raise
        print(f"captune: {'error' if isinstance(known, UserError) else 'failed'}: {known}", file=sys.stderr)
        return 2 if isinstance(known, UserError) else 1
    except KeyboardInterrupt as end:
        if why := lock.lost():
            print(f"captune: failed: {why}", file=sys.stderr)
            return 1
        print("captune: stopped; the same command continues", file=sys.stderr)
        return 143 if isinstance(end, _Terminated) else 130
    finally:
        lock.release_all()


class _Terminated(KeyboardInterrupt):
    """SIGTERM: what a scheduler sends before it kills; the same orderly end as Ctrl-C."""


def _terminate(number: int, frame: object) -> None:
    raise _Terminated


def _refused_by_the_system(error: OSError) -> int:
    """A disk that is full or read-only, a path that is none, a missing permission: one line that names the path."""
    from pipelines.files import refusal

    asked = error.errno in _ASKED
    print(f"captune: {'error' if asked else 'failed'}: {refusal(error, _place())}", file=sys.stderr)
    return 2 if asked else 1


def _of_a_worker(error: Exception) -> UserError | WorkFailed | None:
    """What Ray says that has a sentence of its own."""
    from pipelines.failures import explained

    return explained(error, _place())


def _place() -> str | None:
    """Where this process writes, for errors that name no path."""
    return next((str(directory) for directory in reversed(lock.held())), None)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {entry.about}" for name, entry in COMMANDS.items())
    return (
        "usage: captune COMMAND [options]\n\n"
        f"{lines}\n\n"
        "captune COMMAND --help lists a command's options; every option is also a key of a recipe (--config "
        "RECIPE.yaml)."
    )


if __name__ == "__main__":
    raise SystemExit(main())
