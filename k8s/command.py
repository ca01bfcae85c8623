"""`captune k8s`: manifests of a recipe, a run of it on a cluster, and what the cluster lacks."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from types import SimpleNamespace

from pipelines.errors import UserError
from pipelines.progress import say
from ray_jobs._options import CONFIG, WHOLE, Command, Option, parse, required
from ray_jobs.recipe import Recipe

_RECIPE = Option("--recipe", "RECIPE", "recipe file, or the name of one that comes with captune", key=CONFIG)
_OVERLAY = Option("--overlay", "NAME", "a folder of k8s/overlays: kind, gpu-24gb, gpu-80gb, gpu-80gb-kueue")
_IMAGE = Option("--image", "IMAGE", "REPOSITORY:TAG or REPOSITORY@sha256:DIGEST", default="")
_CONTEXT = Option("--context", "NAME", "of your kubeconfig; else the current one", default="")
COMMAND = Command(
    "k8s render",
    "Render Kubernetes manifests in which a recipe's needs are the numbers; pipe them into kubectl apply -f -.",
    (
        _RECIPE,
        _OVERLAY,
        Option("--workload", "NAME", "run, a stage, preflight, cluster, or serve", default="run"),
        Option("--arm", "NAME", "of a stage or of serve; else all, and of serve the last", default=""),
        Option("--seed", "N", "of training and what follows; else all, and of serve the first", number=True),
        _IMAGE,
        Option("--output", "FILE", "file to write instead of standard output", path=True),
    ),
    reads=WHOLE,
    first="--recipe",
    example="captune k8s render sample --overlay kind | kubectl apply -f -",
)
RUN = Command(
    "k8s run",
    "Run a recipe on a cluster, a job for each stage in turn, and fetch the report. The same command continues; Ctrl-C "
    "leaves the cluster at work.",
    (
        _RECIPE,
        _OVERLAY,
        Option("--whole", about="one job that walks the whole recipe, instead of one for each stage"),
        _IMAGE,
        _CONTEXT,
        Option("--patience", "MINUTES", "how long a job may wait for its start, all attempts together", default=60,
               number=True),
        Option("--output", "DIR", "where logs and report go (default runs/ and the run's name)", path=True, default=""),
    ),
    reads=WHOLE,
    first="--recipe",
    example="captune k8s run sample --overlay kind",
)  # fmt: skip
DOCTOR = Command(
    "k8s doctor",
    "Say what a cluster lacks for an overlay, a line each with what to do; exit status 1 when something is missing.",
    (_RECIPE, _OVERLAY, _CONTEXT),
    reads=WHOLE,
    first="--recipe",
    example="captune k8s doctor --overlay gpu-24gb",
)
COMMANDS = {"render": COMMAND, "run": RUN, "doctor": DOCTOR}


def main(argv: list[str]) -> int:
    """`captune k8s render`, `run` or `doctor`; keys of the recipe may follow."""
    if argv[:1] in (["-h"], ["--help"], ["help"]):
        print(_page())
        raise SystemExit(0)
    if argv[:1] == [] or argv[0] not in COMMANDS:
        raise UserError(f"captune k8s needs one of {', '.join(COMMANDS)}; captune k8s --help says what they do")
    recipe, options = parse(COMMANDS[argv[0]], argv[1:])
    from k8s import render

    required(options.overlay, f"--overlay, one of {', '.join(render.OVERLAYS)}", f"k8s {argv[0]}")
    return {"render": _render, "run": _run, "doctor": _doctor}[argv[0]](recipe, options)


def _render(recipe: Recipe, options: SimpleNamespace) -> int:
    from k8s import render

    objects = render.render(recipe, options.overlay, options.workload, options.arm, options.seed, options.image)
    text = json.dumps(objects) if options.json else render.to_yaml(objects)
    if options.output:
        Path(options.output).write_text(text)
        say(f"k8s: wrote {options.output}; kubectl apply -f {options.output}")
    else:
        print(text, end="")
    return 0


def _run(recipe: Recipe, options: SimpleNamespace) -> int:
    from k8s import launch
    from k8s.kubectl import Kubectl

    place = Path(options.output or Path("runs") / Path(recipe.run_dir).name)
    wanted = launch.plan(recipe, options.overlay, options.image, options.whole)
    kubectl = Kubectl(wanted.namespace, options.context)
    report = launch.run(recipe, wanted, kubectl, place, 60.0 * options.patience)
    if options.json:
        print(json.dumps({"run_dir": recipe.run_dir, "report": report and str(report)}))
    found = f"open {report}; " if report else ""
    say(f"k8s: done: {found}the run directory {recipe.run_dir} stays on the cluster's volume")
    return 0


def _doctor(recipe: Recipe, options: SimpleNamespace) -> int:
    """With a recipe what it needs; without one, what the overlay itself says."""
    from k8s import doctor, kustomize, launch, render
    from k8s.kubectl import Kubectl

    if options.overlay not in render.OVERLAYS:
        raise UserError(f"--overlay {options.overlay}: no such overlay (there are {', '.join(render.OVERLAYS)})")
    objects = kustomize.build(render.FOLDER / "overlays" / options.overlay)
    namespace = next(found["metadata"]["name"] for found in objects if found["kind"] == "Namespace")
    if recipe.arms:
        objects = launch.plan(recipe, options.overlay).objects
    found = doctor.examine(Kubectl(namespace, options.context), objects)
    if options.json:
        print(json.dumps([each.json() for each in found]))
    else:
        print("\n".join(map(str, found)))
    return int(any(each.state == doctor.MISSING for each in found))


def _page() -> str:
    width = max(map(len, COMMANDS))
    lines = [
        textwrap.fill(command.about, 110, initial_indent=f"  {name:<{width}}  ", subsequent_indent=" " * (width + 4))
        for name, command in COMMANDS.items()
    ]
    usage, more = (
        f"usage: captune k8s {'|'.join(COMMANDS)} [options]",
        "captune k8s COMMAND --help lists what one takes.",
    )
    return "\n".join([usage, "", *lines, "", more, "", "example:", f"  {COMMAND.example}"])
