"""Render Kubernetes manifests in which a recipe's needs are the numbers."""

from __future__ import annotations

import json
from pathlib import Path

from pipelines.errors import UserError
from pipelines.progress import say
from ray_jobs._options import CONFIG, WHOLE, Command, Option, parse, required

COMMAND = Command(
    "k8s render",
    "Render Kubernetes manifests in which a recipe's needs are the numbers; pipe them into kubectl apply -f -.",
    (
        Option("--recipe", "RECIPE", "recipe file, or the name of one that comes with captune", key=CONFIG),
        Option("--overlay", "NAME", "a folder of k8s/overlays: kind, gpu-24gb, gpu-80gb, gpu-80gb-kueue"),
        Option("--workload", "NAME", "run, a stage, preflight, cluster, or serve", default="run"),
        Option("--arm", "NAME", "of a stage or of serve; else all, and of serve the last", default=""),
        Option("--seed", "N", "of training and what follows; else all, and of serve the first", number=True),
        Option("--image", "IMAGE", "REPOSITORY:TAG or REPOSITORY@sha256:DIGEST", default=""),
        Option("--output", "FILE", "file to write instead of standard output", path=True),
    ),
    reads=WHOLE,
    first="--recipe",
    example="captune k8s render sample --overlay kind | kubectl apply -f -",
)


def main(argv: list[str]) -> int:
    """`captune k8s render RECIPE --overlay O [--workload W] | kubectl apply -f -`; keys of the recipe may follow."""
    if argv[:1] != ["render"] and not {"-h", "--help", "--help-all"} & set(argv):
        raise UserError("captune k8s has one command: captune k8s render --recipe RECIPE --overlay OVERLAY")
    recipe, options = parse(COMMAND, argv[1:] if argv[:1] == ["render"] else argv)
    from k8s import render

    overlay = required(options.overlay, f"--overlay, one of {', '.join(render.OVERLAYS)}", "k8s render")
    objects = render.render(recipe, overlay, options.workload, options.arm, options.seed, options.image)
    text = json.dumps(objects) if options.json else render.to_yaml(objects)
    if options.output:
        Path(options.output).write_text(text)
        say(f"k8s: wrote {options.output}; kubectl apply -f {options.output}")
    else:
        print(text, end="")
    return 0
