"""Render Kubernetes manifests in which a recipe's needs are the numbers."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # started by its path: the repository, not this folder, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jsonargparse import ArgumentParser

from pipelines.errors import UserError
from pipelines.progress import say
from ray_jobs import _options, cli


def main(argv: list[str]) -> int:
    """`captune k8s render --recipe R --overlay O [--workload W] | kubectl apply -f -`; keys of the recipe may
    follow.
    """
    if argv[:1] != ["render"] and not {"-h", "--help"} & set(argv):
        raise UserError("captune k8s has one command: captune k8s render --recipe RECIPE --overlay OVERLAY")
    # A recipe comes in as every command's does; here, where a cluster's files are all configuration, it has the clearer
    # name.
    words = [
        "--config" + word.removeprefix("--recipe") if word.split("=")[0] == "--recipe" else word for word in argv[1:]
    ]
    recipe, options = _options.parse("k8s render", __doc__ or "", words or argv, _add_options)
    from k8s import render

    overlay = _options.required(options.overlay, f"--overlay, one of {', '.join(render.OVERLAYS)}", "k8s render")
    text = render.to_yaml(render.render(recipe, overlay, options.workload, options.arm, options.image))
    if options.output:
        Path(options.output).write_text(text)
        say(f"k8s: wrote {options.output}; kubectl apply -f {options.output}")
    else:
        print(text, end="")
    return 0


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--recipe", type=str, help="recipe file, or the name of a recipe that comes with captune")
    parser.add_argument(
        "--overlay", type=str, help="a folder of k8s/overlays: kind, gpu-24gb, gpu-80gb, gpu-80gb-kueue"
    )
    parser.add_argument("--workload", type=str, default="run", help="run, a stage, cluster, or serve")
    parser.add_argument("--arm", type=str, default="", help="of a stage or of serve; default: the recipe's last")
    parser.add_argument("--image", type=str, default="", help="REPOSITORY:TAG or REPOSITORY@sha256:DIGEST")
    parser.add_argument("--output", type=str, help="file to write instead of standard output")


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
