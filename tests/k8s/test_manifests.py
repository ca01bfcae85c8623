"""The manifests: valid for the API server and the operator, in step with the recipes, and checks that can fail."""

from __future__ import annotations

import copy
import importlib
import json
import posixpath
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from k8s import kustomize, names, needs, render
from pipelines.errors import UserError
from ray_jobs import _options, cli, hallway, recipe_file, run
from ray_jobs.recipe import RECIPES, Recipe
from serve import front
from tests.k8s import checks, schemas
from tests.k8s.checks import README, SECRETS, complaints

Object = dict[str, Any]
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml") if "process" not in yaml.safe_load(path.read_text()))
FITS = {name: "kind" if name.startswith("sample") else "gpu-80gb" for name in NAMES}


@cache
def recipe(name: str) -> Recipe:
    return _options.parse(run.COMMAND, [name])[0]


@cache
def _built(overlay: str) -> list[Object]:
    return kustomize.build(render.FOLDER / "overlays" / overlay)


def built(overlay: str) -> list[Object]:
    return copy.deepcopy(_built(overlay))


def the(objects: list[Object], kind: str, name: str) -> Object:
    return next(found for found in objects if found["kind"] == kind and found["metadata"]["name"] == name)


def own_recipe(objects: list[Object], folder: Path) -> Recipe:
    """The recipe in an overlay's ConfigMap, read as a job reads it."""
    (folder / "recipe.yaml").write_text(the(objects, "ConfigMap", "captune-recipe")["data"]["recipe.yaml"])
    return recipe(str(folder / "recipe.yaml"))


def test_kuberays_crds_are_at_hand() -> None:
    """Without them the checks below leave out KubeRay's schemas, and only those."""
    if not schemas.have_crds():
        pytest.skip(f"no KubeRay CRDs at {schemas.CRDS}; CAPTUNE_KUBERAY_CRDS names another place")
    assert schemas.errors(
        {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "x"}, "spec": {"entrypint": "x"}}
    )


@pytest.mark.parametrize("overlay", render.OVERLAYS)
def test_an_overlay_is_valid(overlay: str) -> None:
    assert complaints(built(overlay)) == []


@pytest.mark.parametrize("name", NAMES)
def test_what_render_makes_of_a_recipe_is_valid(name: str) -> None:
    for workload in ("run", "train", "preflight", "cluster", "serve"):
        objects = list(
            yaml.load_all(render.to_yaml(render.render(recipe(name), FITS[name], workload)), yaml.CSafeLoader)
        )
        assert complaints(objects) == []
        work = [found for found in objects if found["kind"] in ("RayCluster", "RayJob", "RayService")]
        assert [found["spec"]["suspend"] for found in work] == [False] * (workload != "preflight"), "what was asked for"


def test_a_plain_overlay_starts_nothing() -> None:
    """`kubectl apply -k` puts a shelf of jobs into the cluster; each waits to be let go."""
    work = [found for found in built("gpu-80gb") if found["kind"] in ("RayCluster", "RayJob", "RayService")]
    assert len(work) == 11
    assert all(found["spec"]["suspend"] is True for found in work)


@pytest.mark.parametrize("overlay", render.OVERLAYS)
def test_an_overlays_numbers_are_those_of_its_recipe(overlay: str, tmp_path: Path) -> None:
    """So that `kubectl apply -k` and `captune k8s render` never disagree, and nobody keeps two files in step."""
    objects = built(overlay)
    filled = copy.deepcopy(objects)
    own = own_recipe(objects, tmp_path)
    render.fill(filled, own, render.most_replicas(objects), render.Step("serve", list(own.arms)[-1]))
    for before, after in zip(objects, filled, strict=True):
        if before["kind"] == "RayService":
            for found in (before, after):
                found["spec"]["serveConfigV2"] = yaml.safe_load(found["spec"]["serveConfigV2"])
        if before["metadata"]["name"] != "captune-recipe":
            assert after == before


def kubectl_is_new() -> bool:
    """Whether there is a kubectl whose Kustomize is of version 5: older ones do not know components or replacements."""
    if shutil.which("kubectl") is None:
        return False
    done = subprocess.run(["kubectl", "version", "--client", "-o", "yaml"], capture_output=True, text=True, check=False)
    return str((yaml.safe_load(done.stdout) or {}).get("kustomizeVersion", "")) >= "v5"


@pytest.mark.skipif(not kubectl_is_new(), reason="no kubectl with Kustomize 5 here to compare with")
@pytest.mark.parametrize("overlay", render.OVERLAYS)
def test_kubectl_kustomize_gives_the_same(overlay: str) -> None:
    done = subprocess.run(
        ["kubectl", "kustomize", str(render.FOLDER / "overlays" / overlay)], capture_output=True, text=True, check=True
    )
    theirs = {
        (found["kind"], found["metadata"]["name"]): found for found in yaml.load_all(done.stdout, yaml.CSafeLoader)
    }
    assert {(found["kind"], found["metadata"]["name"]): found for found in built(overlay)} == theirs


@pytest.mark.parametrize("component", ["bucket", "object-store"])
def test_a_component_that_no_overlay_lists_renders_too(component: str, tmp_path: Path) -> None:
    shutil.copytree(render.FOLDER, tmp_path / "k8s", ignore=shutil.ignore_patterns("__pycache__"))
    overlay = tmp_path / "k8s" / "overlays" / "gpu-24gb"
    file = overlay / "kustomization.yaml"
    file.write_text(file.read_text().replace("  - size\n", f"  - size\n  - ../../components/{component}\n"))
    assert complaints(kustomize.build(overlay)) == []
    if kubectl_is_new():
        subprocess.run(["kubectl", "kustomize", str(overlay)], capture_output=True, check=True)


def parse_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[_options.Command, Recipe]:
    """Hand a command line to the entrypoint that it names, and stop where its options have been understood."""
    seen = []

    def parse(command: _options.Command, argv: list[str]) -> Any:
        seen.append((command, _options.parse(command, argv)[0]))
        raise _Parsed

    assert words[0] == "captune"
    module = importlib.import_module(cli.COMMANDS[words[1]].room)
    monkeypatch.setattr(module, "parse", parse)
    with pytest.raises(_Parsed):
        module.main(words[2:])
    return seen[0]


class _Parsed(Exception):
    pass


def mounted(objects: list[Object], folder: Path) -> Path:
    """What a pod of these objects sees as /etc/captune."""
    (job,) = (found for found in objects if found["kind"] in (*checks.RAY, "Job"))
    _, template = next(checks.pod_templates(job))
    name = next(each["configMap"]["name"] for each in template["spec"]["volumes"] if each["name"] == "recipe")
    folder.mkdir()
    for file, text in the(objects, "ConfigMap", name)["data"].items():
        (folder / file).write_text(text)
    return folder / "recipe.yaml"


def command_of(objects: list[Object], file: Path) -> list[str]:
    """The words of a job, with the recipe where it lies here."""
    (job,) = (found for found in objects if found["kind"] in ("RayJob", "Job"))
    words = (
        shlex.split(job["spec"]["entrypoint"])
        if job["kind"] == "RayJob"
        else job["spec"]["template"]["spec"]["containers"][0]["command"]
    )
    return [str(file) if word == render.RECIPE_FILE else word for word in words]


@pytest.mark.parametrize("name", ["sample", "sample_methods", "mgm2b_1m"])
def test_every_job_does_its_own_step_of_its_own_recipe(name: str, tmp_path: Path) -> None:
    """And all of them together what a whole run does."""
    wanted = replace(recipe(name), seeds=[3, -1]) if name == "sample" else recipe(name)
    done: list[hallway.Step] = []
    for number, step in enumerate(render.stages(wanted)):
        objects = render.render(wanted, FITS[name], *step)
        words = command_of(objects, mounted(objects, tmp_path / str(number)))
        understood, options = _options.parse(run.COMMAND, words[2:])
        recipe_file.require_same(options.recipes[0], options.recipe_is)
        assert understood == wanted
        done += hallway.steps(understood, options.stage, options.arm, options.seed)
    assert done == hallway.steps(wanted)
    suspended = {
        found["metadata"]["name"]: found["spec"]["entrypoint"]
        for found in built(FITS[name])
        if found["kind"] == "RayJob"
    }
    assert suspended == {
        f"captune-{each}": shlex.join(render.entrypoint(render.Step(each))) for each in ("run", *hallway.STAGES)
    }


def test_a_job_with_another_recipes_file_ends_before_its_first_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = render.render(recipe("sample"), "kind", "caption")
    other = render.render(replace(recipe("sample"), seeds=[7]), "kind", "caption")
    monkeypatch.chdir(tmp_path)
    assert cli.main(command_of(mine, mounted(other, tmp_path / "etc"))[1:]) == 2
    assert "holds another recipe" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def _rendered(cases: list[tuple[str, Recipe]], overlay: str) -> Iterator[tuple[str, list[Object]]]:
    for name, wanted in cases:
        last = list(wanted.arms)[-1]
        steps = [*render.stages(wanted), *map(render.Step, ("run", "preflight", "cluster"))]
        for step in [*steps, render.Step("serve", "original"), render.Step("serve", last)]:
            yield f"{name} {step}", render.render(wanted, overlay, *step)


@pytest.mark.parametrize("overlay", ["kind", "gpu-80gb"])
def test_no_object_of_one_recipe_arm_or_stage_changes_anothers(overlay: str) -> None:
    """All pairs of workloads of three recipes, two of which look alike, beside the suspended set; and no pod is of two
    drain budgets.
    """
    plain = recipe("sample")
    shelf = ("the suspended set", built(overlay))
    cases = [("a", plain), ("b", replace(plain, run_dir="runs/b")), ("c", replace(plain, run_dir="runs/Sample"))]
    seen: dict[tuple[str, str], tuple[str, Object]] = {}
    for who, objects in [shelf, *_rendered(cases, overlay)]:
        for found in objects:
            key = (found["kind"], found["metadata"]["name"])
            before = seen.setdefault(key, (who, found))
            assert before[1] == found, f"{key} of {before[0]} and of {who}"
            assert who == before[0] or found["kind"] not in (*checks.RAY, "Job", "HTTPRoute", "PodDisruptionBudget")


@settings(max_examples=300, deadline=None)
@given(*[st.tuples(st.text("ab-_/A", min_size=1, max_size=6), st.sampled_from(names.WORKLOADS), st.text("aA-_"))] * 2)
def test_a_name_is_of_one_run_workload_and_arm_alone(one: tuple[str, str, str], other: tuple[str, str, str]) -> None:
    for said in (one, other, ("x-train-y", "merge", ""), ("x", "train", "y-merge")):
        label = names.of_work(f"runs/{said[0]}", *said[1:])
        assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", label) and len(label) <= 47
    if posixpath.normpath(f"runs/{one[0]}") != posixpath.normpath(f"runs/{other[0]}") or one[1:] != other[1:]:
        assert names.of_work(f"runs/{one[0]}", *one[1:]) != names.of_work(f"runs/{other[0]}", *other[1:])
    assert names.of_work("runs/x-train-y", "merge") != names.of_work("runs/x", "train", "y-merge")
    assert names.of_work("runs/x", "train", "y", 1) != names.of_work("runs/x", "train", "y-seed1")


@pytest.mark.parametrize("overlay", render.OVERLAYS)
def test_serve_accepts_the_endpoints_configuration(overlay: str) -> None:
    """`serveConfigV2` passes Serve's schema, names a builder that is there, and that builder takes its arguments."""
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load(the(built(overlay), "RayService", "captune-serve")["spec"]["serveConfigV2"])
    application = ServeDeploySchema.model_validate(config).applications[0]
    module, _, builder = application.import_path.partition(":")
    app = importlib.import_module(module)
    arguments = app.BuildArgs(**application.args)
    deployment = getattr(app, builder)(arguments)._bound_deployment
    assert [entry.name for entry in application.deployments] == [deployment.name]
    scaling = application.deployments[0].autoscaling_config
    assert scaling["target_ongoing_requests"] <= deployment.max_ongoing_requests
    assert config["http_options"]["request_timeout_s"] == arguments.config.request_timeout_s + app._PROXY_GRACE_S


def test_proxies_of_the_endpoint_are_guarded_as_the_recipe_says() -> None:
    """Everywhere by the function that Ray Serve asks, and where a key changes it, with the changed settings."""
    plain = recipe("sample")
    changed = replace(plain, serve=replace(plain.serve, keys="/data/keys.yaml"))
    for serving, expected in ((plain, None), (changed, "/data/keys.yaml")):
        found = next(each for each in render.render(serving, "kind", "serve") if each["kind"] == "RayService")
        spec = render.cluster_spec(found)
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            env = {e["name"]: e.get("value") for e in group["template"]["spec"]["containers"][0]["env"]}
            module, _, function = env[front.CALLBACK].partition(":")
            assert callable(getattr(importlib.import_module(module), function))
            assert json.loads(env.get(front.SETTINGS, '{"keys": null}'))["keys"] == expected


@pytest.mark.parametrize(
    ("overlay", "changes", "words"),
    [
        ("kind", {"caption.gpus_per_actor": 1}, "caption.gpus_per_actor: a replica needs 1 GPU"),
        ("kind", {"train.use_gpu": True}, "train.use_gpu: a worker needs 1 GPU"),
        ("kind", {"train.workers": 2, "train.cpus_per_worker": 3}, "train.cpus_per_worker: a worker needs 3 CPUs"),
        ("kind", {"train.feature_cache_mb": 4096}, "train.feature_cache_mb: 4.0 GiB"),
        ("gpu-24gb", {"caption.gpus_per_actor": 2}, "a pod of the overlay's group caption has 1"),
        ("kind", {"dataset": "/home/me/pairs"}, "dataset: /home/me/pairs is on this machine"),
        ("kind", {"refine.recipe": "nonesuch.yaml"}, "nonesuch.yaml: no such Data-Juicer recipe"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_by_its_key(overlay: str, changes: Object, words: str) -> None:
    options = [
        word
        for key, value in changes.items()
        for word in (f"--{key}", str(value).lower() if value is True else str(value))
    ]
    unfit, _ = _options.parse(run.COMMAND, ["sample", *options])
    with pytest.raises(UserError, match=words.replace("(", r"\(").replace(".", r"\.")):
        render.render(unfit, overlay)


@pytest.mark.parametrize(
    ("changes", "group", "most"),
    [
        ({"caption.actors": 20, "caption.gpus_per_actor": 1}, "caption", 20),
        ({"caption.actors": 20, "caption.gpus_per_actor": 0.5}, "caption", 10),
        ({"caption.actors": 20, "caption.gpus_per_actor": 1}, "cpu", 6),  # 1 + 20 x 4 CPUs in pods of 16
        ({"train.workers": 4, "train.use_gpu": "true"}, "train", 1),  # four cards a pod
        ({"train.workers": 9, "train.use_gpu": "true"}, "train", 3),
        ({"caption.gpus_per_actor": 0}, "caption", 0),
    ],
)
def test_a_recipes_needs_become_numbers_of_pods(changes: Object, group: str, most: int) -> None:
    options = [word for key, value in changes.items() for word in (f"--{key}", str(value))]
    wanted, _ = _options.parse(run.COMMAND, ["sample", "--train.feature_cache_mb", "512", *options])
    job = the(render.render(wanted, "gpu-80gb"), "RayJob", "captune-sample-run")
    found = next(entry for entry in render.cluster_spec(job)["workerGroupSpecs"] if entry["groupName"] == group)
    assert found["maxReplicas"] == most
    assert found["minReplicas"] == (1 if group == "cpu" else 0)


def test_an_endpoint_of_several_pods_can_be_drained_one_by_one() -> None:
    """An integer, which Kubernetes can hold against pods that a RayCluster owns; and nothing where one pod is all."""
    wanted, count = recipe("mgm2b_1m"), 3
    wanted = replace(wanted, serve=replace(wanted.serve, replicas=count))
    objects = render.render(wanted, "gpu-80gb", "serve")
    seed = wanted.seeds[0] if len(wanted.seeds) > 1 else None
    budget = the(objects, "PodDisruptionBudget", names.of_work(wanted.run_dir, "serve", list(wanted.arms)[-1], seed))
    assert complaints(objects) == [] and budget["spec"]["minAvailable"] == count - 1
    service = the(objects, "RayService", budget["metadata"]["name"])
    (deployment,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["deployments"]
    for replicas in (3, 4):  # a changed model starts one replica first, and there is a pod for it
        assert -(-deployment["max_surge_percent"] * replicas // 100) == 1
    (group,) = (each for each in render.cluster_spec(service)["workerGroupSpecs"] if each["groupName"] == "serve")
    assert group["maxReplicas"] == deployment["autoscaling_config"]["max_replicas"] + 1
    assert budget["spec"]["selector"]["matchLabels"].items() <= group["template"]["metadata"]["labels"].items()
    for name in ("sample", "mgm2b_30k"):
        kinds = {found["kind"] for found in render.render(recipe(name), FITS[name], "serve")}
        assert "PodDisruptionBudget" not in kinds


def test_captioning_needs_no_arms(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("run_dir: runs/x\ndataset: pairs.jsonl\n")
    bare = recipe(str(tmp_path / "r.yaml"))
    assert render.stages(bare) == [render.Step("caption")]
    job = the(render.render(bare, "kind", "caption"), "RayJob", "captune-x-caption")
    assert "--stage caption" in job["spec"]["entrypoint"]


def test_ones_own_data_juicer_recipe_travels_with_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "strict.yaml").write_text("process:\n  - words_num_filter: {min_num: 9}\n")
    (tmp_path / "r.yaml").write_text(
        f"base: sample\narms:\n  original: {{text: caption}}\n  enhanced: {{text: recaption, recipe: "
        f"{tmp_path / 'strict.yaml'}}}\n"
    )
    wanted = recipe(str(tmp_path / "r.yaml"))
    file = mounted(render.render(wanted, "kind"), tmp_path / "etc")
    assert "min_num: 9" in file.with_name("strict.yaml").read_text()
    assert yaml.safe_load(file.read_text())["arms"]["enhanced"]["recipe"] == "/etc/captune/strict.yaml"
    mark = the(render.render(wanted, "kind"), "RayJob", "captune-sample-run")["metadata"]["annotations"][render.DIGEST]
    recipe_file.require_same(str(file), mark)
    file.with_name("strict.yaml").write_text("process:\n  - words_num_filter: {min_num: 8}\n")
    with pytest.raises(UserError, match="another recipe"):
        recipe_file.require_same(str(file), mark)


def test_the_image_is_named_by_digest_or_version_and_never_by_latest() -> None:
    digest = "sha256:" + "a" * 64
    objects = render.render(recipe("sample"), "kind", image=f"registry.example:5000/ml/captune@{digest}")
    images = {container["image"] for container in kustomize.containers(objects)}
    assert images == {f"registry.example:5000/ml/captune@{digest}", "redis:7.4.2-alpine"}
    for image in ("captune", "registry.example:5000/captune", "captune:latest"):
        with pytest.raises(UserError, match="name a version"):
            render.render(recipe("sample"), "kind", image=image)


def test_the_manifests_name_the_version_that_they_come_with() -> None:
    from importlib import metadata

    from pipelines import __version__

    objects = built("kind")
    assert f"captune:{__version__}" in {container["image"] for container in kustomize.containers(objects)}
    assert the(objects, "RayCluster", "captune")["spec"]["rayVersion"] == metadata.version("ray")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["apply"], "one of render, run, doctor"),
        (["render", "--recipe", "sample"], "--overlay, one of"),
        (["render", "--recipe", "sample", "--overlay", "minikube"], "no such overlay"),
        (["render", "--recipe", "sample", "--overlay", "kind", "--workload", "serv"], "must be one of run"),
        (
            ["render", "--recipe", "sample", "--overlay", "kind", "--arm", "enhnaced"],
            "the recipe's arms are original, none, filtered, recaptioned, enhanced",
        ),
        (["render", "--recipe", "nonesuch", "--overlay", "kind"], "nonesuch: no such recipe"),
    ],
)
def test_the_command_refuses_the_impossible(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["k8s", *argv]) == 2
    assert words in capsys.readouterr().err


def test_the_command_prints_manifests(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["k8s", "render", "--recipe", "sample", "--overlay", "kind", "--caption.batch_size", "7"]) == 0
    objects = list(yaml.load_all(capsys.readouterr().out, yaml.CSafeLoader))
    (file,) = [found["data"]["recipe.yaml"] for found in objects if found["kind"] == "ConfigMap"]
    assert "batch_size: 7" in file


def commands() -> list[list[str]]:
    """Commands in the README's code blocks, one list for each block; a command may go on in the next line."""
    blocks = re.findall(r"^```\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return [block.replace("\\\n", " ").strip().splitlines() for block in blocks]


def test_a_newcomer_needs_fewer_than_ten_commands() -> None:
    first = commands()[0]
    assert first[-1].startswith("captune k8s run ")
    assert len(first) < 10


def test_the_readmes_commands_are_understood(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line for block in commands() for line in block if "captune " in line.replace("-n captune ", "")]
    ours = [
        line.split(" -- ")[-1].split("|")[0].strip()
        for line in lines
        if line.startswith("captune ") or " -- captune " in line
    ]
    assert len(ours) >= 3
    for line in ours:
        words = shlex.split(line)
        if words[1:3] == ["k8s", "render"]:
            assert cli.main(words[1:]) == 0
        elif words[1] == "k8s":  # which would look for a cluster
            with pytest.raises(SystemExit, match="0"):
                cli.main([*words[1:], "--help"])
        else:
            parse_command(words, monkeypatch)


def test_the_readme_names_what_the_manifests_and_kuberay_make() -> None:
    for workload, suffix in (("cluster", "head-svc"), ("serve", "serve-svc")):
        (name,) = (
            found["metadata"]["name"]
            for found in render.render(recipe("sample"), "kind", workload)
            if found["kind"] in ("RayCluster", "RayService")
        )
        assert f"service/{name}-{suffix}" in README
    assert f"job/{names.of_work('runs/sample', 'run')}" in README
    assert {("captune-ray-token", "auth_token"), ("captune-redis", "password")} <= SECRETS
    for overlay in render.OVERLAYS:
        assert overlay in README


def _job(objects: list[Object]) -> Object:
    return the(objects, "RayJob", "captune-caption")


def _pod(objects: list[Object]) -> Object:
    return render.cluster_spec(_job(objects))["workerGroupSpecs"][1]["template"]["spec"]


MUTATIONS: dict[str, tuple[Callable[[list[Object]], Any], str]] = {
    "a misspelt field of KubeRay": (lambda o: _job(o)["spec"].update(backOffLimit=3), "backOffLimit"),
    "a misspelt field of a pod": (
        lambda o: _pod(o)["containers"][0].update(workingDirectory="/data"),
        "workingDirectory",
    ),
    "a misspelt field of a policy": (
        lambda o: the(o, "NetworkPolicy", "captune-ray")["spec"].update(ingres=[]),
        "ingres",
    ),
    "a name too long for the operator": (lambda o: _job(o)["metadata"].update(name="c" * 48), "47 characters"),
    "a job that cannot be suspended": (lambda o: _job(o)["spec"].update(shutdownAfterJobFinishes=False), "suspended"),
    "a strategy behind a gate": (
        lambda o: _job(o)["spec"].update(deletionStrategy={"deletionRules": []}),
        "deletionStrategy",
    ),
    "a pod that would be restarted": (lambda o: _pod(o).update(restartPolicy="Always"), "Never or unset"),
    "more pods at least than at most": (
        lambda o: render.cluster_spec(_job(o))["workerGroupSpecs"][1].update(minReplicas=99),
        "greater than maxReplicas",
    ),
    "an autoscaler's field without it": (
        lambda o: render.cluster_spec(_job(o)).pop("autoscalerOptions"),
        "idleTimeoutSeconds",
    ),
    "an old Ray": (lambda o: render.cluster_spec(_job(o)).update(rayVersion="2.50.0"), "2.52.0"),
    "no token": (lambda o: render.cluster_spec(_job(o)).pop("authOptions"), "no token authentication"),
    "a number where Ray wants text": (
        lambda o: render.cluster_spec(_job(o))["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        "must be strings",
    ),
    "a root container": (lambda o: _pod(o)["securityContext"].update(runAsNonRoot=False), "may be root"),
    "a writable root file system": (lambda o: _pod(o)["containers"][0].pop("securityContext"), "root file system"),
    "a host path": (lambda o: _pod(o)["volumes"].append({"name": "h", "hostPath": {"path": "/"}}), "refused"),
    "a forgotten volume": (lambda o: _pod(o)["volumes"].pop(1), "is no volume"),
    "an account that nobody makes": (lambda o: _pod(o).update(serviceAccountName="captain"), "ServiceAccount captain"),
    "a password in clear": (
        lambda o: _pod(o)["containers"][0]["env"].append({"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}),
        "in clear",
    ),
    "a secret that nobody is told to make": (
        lambda o: the(o, "StatefulSet", "captune-redis")["spec"]["template"]["spec"]["containers"][0]["env"][0][
            "valueFrom"
        ]["secretKeyRef"].update(key="pass"),
        "nobody is told",
    ),
    "latest": (lambda o: _pod(o)["containers"][0].update(image="captune:latest"), "another one tomorrow"),
    "an object store larger than /dev/shm": (
        lambda o: render.cluster_spec(_job(o))["workerGroupSpecs"][1]["rayStartParams"].update(
            {"object-store-memory": "99999999999"}
        ),
        "/dev/shm",
    ),
    "no namespace": (lambda o: _job(o)["metadata"].pop("namespace"), "not in namespace"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_checks_can_fail(mutation: str) -> None:
    if mutation == "a misspelt field of KubeRay" and not schemas.have_crds():
        pytest.skip("needs KubeRay's CRDs")
    change, words = MUTATIONS[mutation]
    kinds, names = (
        ("ServiceAccount", "PriorityClass", "PersistentVolumeClaim", "ConfigMap"),
        ("captune-ray", "captune-redis", "captune-caption"),
    )
    chosen = [found for found in _built("gpu-24gb") if found["kind"] in kinds or found["metadata"]["name"] in names]
    objects = copy.deepcopy(chosen)
    change(objects)
    found = complaints(objects)
    assert any(words in text for text in found), found
    assert len(found) <= 3, "one fault, few complaints"


def test_the_renderer_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    """Silence would be worse: kubectl would do something that render leaves out."""
    (tmp_path / "kustomization.yaml").write_text("kind: Kustomization\nnamePrefix: a-\n")
    with pytest.raises(UserError, match="namePrefix: not known"):
        kustomize.build(tmp_path)


def test_quantities() -> None:
    assert [needs.quantity(text) for text in ("500m", "2", "16Gi", "1Ki", 3)] == [0.5, 2, 16 * 2**30, 1024, 3]


@pytest.mark.parametrize("name", ["1e5", "0o17", "y", "No", "26408881640129e9"])
def test_a_text_that_kubernetes_would_read_as_a_number_is_quoted(name: str) -> None:
    """Its reader of YAML knows numbers and truth values that Python's does not, and refuses a label that is one."""
    wanted, _ = _options.parse(run.COMMAND, ["sample", "--run_dir", f"runs/{name}"])
    text = render.to_yaml(render.render(wanted, "kind"))
    assert f"captune.dev/run: '{name.lower()}'" in text or f"captune.dev/run: {name.lower()}-" in text
    assert f"captune.dev/run: {name.lower()}\n" not in text


@pytest.mark.parametrize("run_dir", ["../sample", "/data/../etc/x", "/data", "s3://bucket/run", "/home/me/run"])
def test_a_run_directory_that_is_not_on_the_volume_is_refused(run_dir: str) -> None:
    wanted, _ = _options.parse(run.COMMAND, ["sample", "--run_dir", run_dir, "--sample.out", "/data/world"])
    with pytest.raises(UserError, match="run_dir: "):
        render.render(wanted, "kind")
