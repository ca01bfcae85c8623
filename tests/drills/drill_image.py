"""Build the image and run a cluster of containers from it, as KubeRay's operator would: a worker is killed, the recipe
ends well.

    python tests/drills/drill_image.py [--base IMAGE] [--preflight] [--keep]

Runs as root; on Debian: apt-get install buildah podman netavark iptables runc, and debootstrap where there is no
registry.

Users, commands, environment, mounts and security come from what `captune k8s render --recipe sample --overlay kind`
makes, completed as the operator completes it (ray-operator/controllers/ray/common/pod.go of KubeRay 1.7). Left out: its
autoscaler, which talks to Kubernetes, and Redis (tests/drills/drill_head.py has that). pip settings of this machine
reach the build as secrets and read-only mounts.
"""

from __future__ import annotations

import argparse
import configparser
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from k8s import render  # noqa: E402
from ray_jobs import run as whole_run  # noqa: E402
from ray_jobs._options import parse  # noqa: E402
from ray_jobs.recipe import Recipe  # noqa: E402
from tests.drills.record import Record  # noqa: E402

IMAGE = "localhost/captune:drill"
DEBIAN = "localhost/debian:bookworm"
# The defaults ask for more than a machine that is itself a container may give. All containers' threads count as user
# 1000's.
LIMITS = ["--ulimit", "nofile=20000:20000", "--ulimit", "nproc=16000:16000"]
# runc runs where cgroups of both versions are mounted, too; crun refuses that.
PODMAN = ["podman", "--runtime", "runc"] if shutil.which("runc") else ["podman"]
SMALL = {
    "sample.pairs": 60,
    "sample.instructions": 16,
    "sample.questions": 24,
    "train.align.steps": 120,
    "train.align.micro_batch": 8,
    "train.instruct.steps": 4,
    "train.instruct.micro_batch": 4,
    "train.checkpoint_every": 5,
}


def run(*words: Any, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    """A command, its output kept; what it said is in the error when it fails."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False, **options)
    if check and done.returncode != 0:
        raise SystemExit(
            f"{shlex.join(map(str, words))}: status {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        )
    return done


def make_debian() -> None:
    """Debian itself, from its packages: what stands in for an official image where no registry is reachable."""
    if run("podman", "image", "exists", DEBIAN, check=False).returncode == 0:
        return
    with tempfile.TemporaryDirectory() as scratch:
        run("debootstrap", "--variant=minbase", "bookworm", f"{scratch}/root")
        clean = Path(
            scratch, "root/etc/apt/apt.conf.d/docker-clean"
        )  # as in the official images: packages are not kept
        clean.write_text('DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb /var/cache/apt/*.bin || true"; };\n')
        run("bash", "-c", f"tar -C {scratch}/root -c . | podman import - {DEBIAN}")


def pip_words(scratch: Path) -> list[str]:
    """This machine's pip settings for the build: a pip.conf and a certificate as secrets, local indexes as read-only
    mounts.
    """
    found: dict[str, str] = {}
    for line in run(sys.executable, "-m", "pip", "config", "list").stdout.splitlines():
        key, _, value = line.partition("=")
        name = key.rpartition(".")[2]
        if name in ("cert", "index-url", "extra-index-url", "find-links", "timeout", "trusted-host", "proxy"):
            found[name] = value.strip("'\"").replace("\\n", " ")
    words = []
    if "cert" in found:
        words += ["--secret", f"id=ca.crt,src={found['cert']}"]
        found["cert"] = "/run/secrets/ca.crt"
    places = [word for key in ("index-url", "extra-index-url", "find-links") for word in found.get(key, "").split()]
    for place in {urlparse(place).path for place in places if place.startswith(("/", "file:"))}:
        folder = Path(place).parent if Path(place).name == "simple" else Path(place)
        words += ["--volume", f"{folder}:{folder}:ro"]
    settings = configparser.ConfigParser(interpolation=None)
    settings["global"] = found
    with (scratch / "pip.conf").open("w") as stream:
        settings.write(stream)
    return [*words, "--secret", f"id=pip.conf,src={scratch / 'pip.conf'}"]


def build(base: str, torch_cpu_index: str | None, scratch: Path, record: Record) -> None:
    """The CPU image."""
    arguments = {"BASE": base, "VARIANT": "cpu"} | (
        {} if torch_cpu_index is None else {"TORCH_CPU_INDEX": torch_cpu_index}
    )
    words = [word for key, value in arguments.items() for word in ("--build-arg", f"{key}={value}")]
    began = time.monotonic()
    run("buildah", "build", "--isolation", "chroot", *LIMITS, "--layers", *words, *pip_words(scratch),
        "--file", ROOT / "k8s" / "Dockerfile", "--tag", IMAGE, ROOT)  # fmt: skip
    facts = json.loads(run("podman", "image", "inspect", IMAGE).stdout)[0]
    record.say(
        f"built: {facts['Size'] / 1e6:.0f} MB in {time.monotonic() - began:.0f} s, user "
        f"{facts['User'] or facts['Config']['User']}"
    )
    history = run("podman", "history", "--no-trunc", "--format", "{{.CreatedBy}}", IMAGE).stdout
    record.check("pip.conf" not in history and "PIP_" not in history, "its history has no setting of the build's pip")


class Pods:
    """Containers on a network of their own, made from a RayCluster's spec as the operator makes pods."""

    def __init__(self, spec: dict[str, Any], scratch: Path, volumes: dict[str, Path]) -> None:
        self.spec, self.scratch, self.volumes = spec, scratch, volumes
        self.name = f"captune-{uuid.uuid4().hex[:8]}"
        self.token = uuid.uuid4().hex * 2
        self.head = ""
        self.started: list[str] = []

    def __enter__(self) -> Pods:
        run("podman", "network", "create", self.name)
        return self

    def __exit__(self, *_: Any) -> None:
        for name in self.started:
            run(*PODMAN, "rm", "--force", "--time", "0", name, check=False)
        run("podman", "network", "rm", "--force", self.name, check=False)

    def start_head(self) -> str:
        """The head's pod; its address is what the service's name is on Kubernetes."""
        group = self.spec["headGroupSpec"]
        words = {**group["rayStartParams"], "dashboard-host": "0.0.0.0"}
        name = self._start("head", group, "ray start --head", words, "127.0.0.1")
        self.head = run(
            "podman", "inspect", "--format", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", name
        ).stdout.strip()
        return name

    def start_worker(self, number: int) -> str:
        """A pod of the first worker group, after the head answers (the operator's init container waits for that)."""
        group = self.spec["workerGroupSpecs"][0]
        words = {**group["rayStartParams"], "address": f"{self.head}:6379"}
        return self._start(f"worker-{number}", group, "ray start", words, self.head)

    def preflight(self, job: dict[str, Any], name: str) -> subprocess.CompletedProcess[str]:
        """The preflight Job's pod, to its end; no cluster is there."""
        pod = job["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        told = {entry["name"]: entry["value"] for entry in container["env"]}
        words = [*LIMITS, *self._confined(name, pod, told), "--rm", container["image"], *container["command"]]
        return run(*PODMAN, "run", "--network", "none", *words, check=False)

    def client(self, *words: str, token: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command in a container of its own, as the operator's submitter runs `ray job submit`."""
        secret = [
            "--env",
            f"RAY_AUTH_TOKEN={token or self.token}",
            "--env",
            f"RAY_API_SERVER_ADDRESS=http://{self.head}:8265",
        ]
        common = ["--network", self.name, *LIMITS, "--env", "RAY_AUTH_MODE=token", *secret, "--rm"]
        return run(*PODMAN, "run", *common, IMAGE, *words, check=check)

    def inside(self, name: str, command: str) -> subprocess.CompletedProcess[str]:
        """A shell command in a pod."""
        return run(*PODMAN, "exec", name, "/bin/bash", "-c", command, check=False)

    def logs(self, name: str) -> str:
        """What a pod has printed."""
        done = run("podman", "logs", name, check=False)
        return (done.stdout + done.stderr)[-4000:]

    def job(self, name: str) -> str:
        """A job's status, asked in the head's pod."""
        words = f'wget -q -O- --header "Authorization: Bearer $RAY_AUTH_TOKEN" http://127.0.0.1:8265/api/jobs/{name}'
        return str(json.loads(self.inside(self.started[0], words).stdout or '{"status": "no answer"}')["status"])

    def _start(self, name: str, group: dict[str, Any], command: str, params: dict[str, str], address: str) -> str:
        pod = group["template"]["spec"]
        container = pod["containers"][0]
        limits = container["resources"].get("limits", {})
        if "cpu" in limits:
            params = {"num-cpus": limits["cpu"], **params}
        params = {"memory": str(int(limits["memory"].removesuffix("Gi")) << 30), **params}
        params |= {"metrics-export-port": "8080", "dashboard-agent-listen-port": "52365"}
        start = f"{command} {' '.join(f'--{key}={value}' for key, value in sorted(params.items()))} --block"
        environment = {entry["name"]: entry["value"] for entry in container["env"]} | {
            "RAY_ADDRESS": f"{address}:6379", "RAY_PORT": "6379", "RAY_CLUSTER_NAME": "captune",
            "RAY_NODE_TYPE_NAME": name,
            "RAY_CLOUD_INSTANCE_ID": name, "RAY_USAGE_STATS_KUBERAY_IN_USE": "1", "KUBERAY_GEN_RAY_START_CMD": start,
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE": "1",
            # Not the operator's: a pod has CPUs of its own, while these containers share a machine that may be busy.
            "RAY_worker_niceness": "0",
            "RAY_raylet_start_wait_time_s": "300",
        }  # fmt: skip
        words = self._confined(name, pod, environment)
        full = f"{self.name}-{name}"
        self.started.append(full)
        run(*PODMAN, "run", "--detach", "--name", full, "--hostname", name, "--network", self.name, *LIMITS, *words,
            container["image"], "/bin/bash", "-c", "--", f"ulimit -n 20000; {start}")  # fmt: skip
        return full

    def _confined(self, name: str, pod: dict[str, Any], environment: dict[str, str]) -> list[str]:
        """Podman's words for what a pod's only container may do, sees and is told."""
        (container,), user = pod["containers"], pod["securityContext"]
        secure = container["securityContext"]
        words = ["--user", f"{user['runAsUser']}:{user['runAsGroup']}", "--workdir", container["workingDir"]]
        words += ["--cap-drop", ",".join(secure["capabilities"]["drop"])]
        words += ["--read-only", "--read-only-tmpfs=false"] if secure["readOnlyRootFilesystem"] else []
        words += [] if secure["allowPrivilegeEscalation"] else ["--security-opt", "no-new-privileges"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for mount in container["volumeMounts"]:
            words += self._mount(name, mount, volumes[mount["name"]], user["fsGroup"])
        return words + [word for key, value in environment.items() for word in ("--env", f"{key}={value}")]

    def _mount(self, pod: str, mount: dict[str, Any], volume: dict[str, Any], group: int) -> list[str]:
        """A volume's mount: a directory of this machine, or shared memory; an emptyDir is the pod's own and its group's
        to write.
        """
        place = mount["mountPath"]
        if "emptyDir" not in volume:
            return ["--volume", f"{self.volumes[mount['name']]}:{place}:{'ro' if mount.get('readOnly') else 'rw'}"]
        if volume["emptyDir"].get("medium") == "Memory":
            assert place == "/dev/shm"
            return ["--shm-size", volume["emptyDir"]["sizeLimit"].removesuffix("i").lower()]
        folder = self.scratch / f"{pod}-{mount['name']}"
        folder.mkdir()
        os.chown(folder, 0, group)
        folder.chmod(0o2777)
        return ["--volume", f"{folder}:{place}:rw"]


def wait(what: str, seconds: float, holds: Any, explain: Any = lambda: "") -> None:
    """Until `holds()`."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise SystemExit(f"{what}: not within {seconds:g} s\n{explain()}")
        time.sleep(1)


def check_image(pods: Pods, head: str, record: Record) -> None:
    """What the image promises, looked at in the running head."""
    record.check(pods.inside(head, "id -u").stdout.strip() == "1000", "everything runs as user 1000")
    record.check(pods.inside(head, "command -v gcc g++ cc c++ clang make").returncode != 0, "no compiler there")
    record.check(
        pods.inside(head, "touch /opt/captune/x || touch /usr/x").returncode != 0, "code and system cannot be written"
    )
    record.check(pods.inside(head, "touch ~/x && rm ~/x").returncode == 0, "the home can")
    command = (
        "DS_ACCELERATOR=cpu python -c 'from deepspeed.comm.torch import build_shm_op; assert build_shm_op() is not "
        "None'"
    )
    loaded = pods.inside(head, command)
    record.check(
        loaded.returncode == 0,
        f"DeepSpeed's operator loads without one {loaded.stderr[-300:] if loaded.returncode else ''}",
    )
    for port, path in ((52365, "api/local_raylet_healthz"), (8265, "api/gcs_healthz")):
        probe = f"wget --tries 1 -T 10 -q -O- http://localhost:{port}/{path} | grep success"
        record.check(pods.inside(head, probe).returncode == 0, f"KubeRay's probe of {path} succeeds")


def drill_preflight(pods: Pods, recipe: Recipe, record: Record) -> None:
    """Before any cluster: the recipe as it is passes; one with a model that is not there ends with the sentence."""
    wrong = replace(recipe, caption=replace(recipe.caption, model="/models/nonesuch"))
    for name, wanted, status in (("preflight", recipe, 0), ("preflight-wrong", wrong, 2)):
        job = fill_recipe(render.render(wanted, "kind", "preflight", image=IMAGE), pods.volumes["recipe"], "Job")
        began = time.monotonic()
        done = pods.preflight(job, name)
        said = done.stderr.strip().splitlines()[-1:]
        record.check(done.returncode == status, f"{name}: status {done.returncode}, {time.monotonic() - began:.0f} s")
        for line in said:
            print(f"           | {line}")
    record.check("/models/nonesuch" in done.stderr, "it names the model that is not there")


def fill_recipe(objects: list[dict[str, Any]], place: Path, kind: str) -> dict[str, Any]:
    """Put the files of the recipe's ConfigMap where they are mounted; returns the object of a kind."""
    files = next(found for found in objects if found["kind"] == "ConfigMap" and "recipe.yaml" in found["data"])
    for name, text in files["data"].items():
        (place / name).write_text(text)
    return next(found for found in objects if found["kind"] == kind)


def drill(pods: Pods, entrypoint: str, run_dir: Path, record: Record) -> None:
    """Head, two workers, the recipe, a killed worker, SUCCEEDED."""
    head = pods.start_head()
    wait(
        "the head answers",
        400,
        lambda: pods.inside(head, "ray health-check").returncode == 0,
        lambda: pods.logs(head),
    )
    record.say(f"up: head at {pods.head}")
    check_image(pods, head, record)
    workers = [pods.start_worker(number) for number in (1, 2)]
    count = (
        'import ray; ray.init(logging_level="ERROR"); print("nodes", sum(n["Alive"] for n in ray.nodes()), "cpus", '
        'ray.cluster_resources().get("CPU"))'
    )
    wait(
        "two workers",
        400,
        lambda: "nodes 3 cpus 4" in pods.inside(head, f"python -c '{count}'").stdout,
        lambda: pods.logs(workers[0]),
    )
    record.say("up: two workers of two CPUs each")
    refused = pods.client("ray", "job", "list", token="0" * 64, check=False)
    record.check(
        refused.returncode != 0 and "Invalid authentication token" in refused.stdout + refused.stderr,
        "a wrong token is refused",
    )
    pods.client("ray", "job", "submit", "--submission-id", "recipe", "--no-wait", "--", *shlex.split(entrypoint))
    record.say(f"submitted: {entrypoint}")

    def log() -> str:
        return pods.client("ray", "job", "logs", "recipe").stdout[-4000:]

    def running() -> bool:
        status = pods.job("recipe")
        if status not in ("PENDING", "RUNNING"):
            raise SystemExit(f"the job is {status}\n{log()}")
        return True

    training = run_dir / "original" / "adapter" / "log.jsonl"
    wait(
        "training has a checkpoint",
        900,
        lambda: running() and training.exists() and len(training.read_text().splitlines()) > 6,
        log,
    )
    find = "grep -l [R]ayTrainWorker /proc/[0-9]*/cmdline"  # the bracket keeps the shell from finding itself
    victim = next(name for name in workers if "/proc" in pods.inside(name, find).stdout)
    run(*PODMAN, "kill", victim)
    record.say(f"killed: {victim}, the one that trains, at step {len(training.read_text().splitlines())}")
    wait("the job ends", 900, lambda: pods.job("recipe") not in ("PENDING", "RUNNING", "no answer"), log)
    record.check(
        pods.job("recipe") == "SUCCEEDED",
        f"the job is {pods.job('recipe')}{'' if pods.job('recipe') == 'SUCCEEDED' else log()}",
    )
    steps = [json.loads(line)["step"] for line in training.read_text().splitlines() if '"align"' in line]
    record.check(
        steps == list(range(1, SMALL["train.align.steps"] + 1)),
        "training went on from its checkpoint: each step is there once",
    )
    comparison = json.loads((run_dir / "comparison.json").read_text())
    record.check(
        "differences" in comparison and (run_dir / "report" / "index.html").is_file(),
        "comparison and report are written",
    )
    for line in log().splitlines()[-4:]:
        print(f"           | {line}")


def main() -> int:
    """Run the drill."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--base", default=DEBIAN, help=f"base image; {DEBIAN} is made with debootstrap when it is not there"
    )
    parser.add_argument("--torch-cpu-index", help="index of PyTorch's CPU build; '' when pip is set up for one already")
    parser.add_argument("--preflight", action="store_true", help="end after the preflight, before there is a cluster")
    parser.add_argument("--keep", action="store_true", help="keep the run directory")
    options = parser.parse_args()
    for tool in ("buildah", "podman"):
        if shutil.which(tool) is None:
            raise SystemExit(f"{tool} is not installed (apt-get install {tool})")
    record = Record("drill: the image, and a cluster of containers that loses one")
    recipe, _ = parse(whole_run.COMMAND, ["sample", *(f"--{key}={value}" for key, value in SMALL.items())])
    objects = render.render(recipe, "kind", "run", image=IMAGE)
    scratch = Path(tempfile.mkdtemp(prefix="captune-drill-"))
    try:
        if options.base == DEBIAN:
            make_debian()
        build(options.base, options.torch_cpu_index, scratch, record)
        volumes = {name: scratch / name for name in ("data", "models", "recipe")}
        for place in volumes.values():
            place.mkdir()
            os.chown(place, 1000, 1000)
        cluster = render.cluster_spec(next(found for found in objects if found["kind"] == "RayJob"))
        with Pods(cluster, scratch, volumes) as pods:
            drill_preflight(pods, recipe, record)
            if options.preflight:
                return 0
            job = fill_recipe(objects, volumes["recipe"], "RayJob")
            drill(pods, job["spec"]["entrypoint"], volumes["data"] / recipe.run_dir, record)
    finally:
        if not options.keep:
            shutil.rmtree(scratch, ignore_errors=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
