"""Names of what is rendered: by the run, so that recipes, arms and stages live side by side in one namespace.

`captune-RUN-WORKLOAD[-ARM][-seedN]`, where RUN is the run directory below `runs/`. What Kubernetes does not allow in a
name, or what could be read as another's, is made unique by a few digits of a hash of what was said.
"""

from __future__ import annotations

import hashlib
import posixpath
import re

from ray_jobs.hallway import STAGES

DATA = "/data"
"""Relative paths of a recipe count from here: every container's working directory, on the shared volume."""
LONGEST = 47
"""What KubeRay allows a RayJob or RayService."""
WORKLOADS = ("run", *STAGES, "preflight", "cluster", "serve")
_PLAIN = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_MEANS_SOMETHING = re.compile(rf"(.+-)?({'|'.join(WORKLOADS)})(-.*)?|(.+-)?seed\d+")


def of_run(run_dir: str) -> str:
    """A run's part of names, and the value of its label."""
    place = posixpath.normpath(posixpath.join(DATA, run_dir))
    name = place.removeprefix(f"{DATA}/runs/")
    # a run may be called `sample`; it is what comes after a first word that could be a workload
    return _shortened(name if _is_plain(name.partition("-")[2]) and _PLAIN.fullmatch(name) else _marked(name), 20)


def of_work(run_dir: str, workload: str, arm: str = "", seed: int | None = None) -> str:
    """Name of the RayJob, RayCluster, RayService or Job."""
    parts = ["captune", of_run(run_dir), workload]
    parts += [arm if _PLAIN.fullmatch(arm) and _is_plain(arm) else _marked(arm)] if arm else []
    parts += [] if seed is None else [f"seed{seed}" if seed >= 0 else _marked(f"seed{seed}")]
    return _shortened("-".join(parts), LONGEST)


def of_recipe(digest: str) -> str:
    """Name of the ConfigMap that holds a recipe."""
    return f"captune-recipe-{digest}"


def _is_plain(words: str) -> bool:
    """Nothing in it could be read as another part of a name."""
    return not _MEANS_SOMETHING.fullmatch(words)


def _marked(text: str) -> str:
    slug = "-".join(re.findall(r"[a-z0-9]+", text.lower()))
    return "-".join(filter(None, [slug, _hash(text)]))


def _shortened(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 6].rstrip('-')}-{_hash(name)}"


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()[:5]
