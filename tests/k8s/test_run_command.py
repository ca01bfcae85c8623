"""`captune k8s run` as a user walks it, against a `kubectl` that plays an API server and KubeRay from frames.

The frames have the shape of the real ones: their statuses and pods are held against KubeRay's CRD and the core schema.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from k8s import doctor, follow, launch, render
from ray_jobs import _options, cli, run
from ray_jobs.recipe import Recipe
from tests.k8s import schemas
from tests.k8s.answers import Stage, answers

Object = dict[str, Any]
MINE = """run_dir: runs/mine
dataset: pairs.jsonl
arms: {enhanced: {text: recaption}}
caption: {model: /models/blip2, cpus_per_actor: 0.9}
train: {model: /models/mgm, instruct_data: instruct.json}
evaluate: {annotations: val.json, images: pictures}
"""
STARTED = "2026-11-27T08:00:00Z"


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """A cluster that has everything, the user's folder, and a recipe of one arm there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(follow, "EVERY_S", 0.01)
    (tmp_path / "mine.yaml").write_text(MINE)
    return answers(tmp_path, monkeypatch)


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor asks for little: what it finds is for its own tests."""
    monkeypatch.setattr(doctor, "CHECKS", ())


def recipe() -> Recipe:
    return _options.parse(run.COMMAND, ["mine.yaml"])[0]


def plan(whole: bool = True) -> launch.Plan:
    return launch.plan(recipe(), "kind", whole=whole)


def status(job: Object, now: str, result: str = "", failed: int = 0, **more: Any) -> Object:
    """A RayJob's status as KubeRay writes it."""
    name = job["metadata"]["name"]
    cluster = {"rayClusterName": f"{name}-x7k2p", "jobId": f"{name}-q9d4t", "startTime": STARTED} if now else {}
    found = {"jobDeploymentStatus": now, "jobStatus": result, "failed": failed, "succeeded": int(result == "SUCCEEDED")}
    return {**cluster, **found, **more}


def pod(name: str, labels: Object, phase: str = "Running", **more: Any) -> Object:
    spec = {"containers": [{"name": "c", "image": "captune:0.1.0", "resources": {"limits": {"nvidia.com/gpu": "1"}}}]}
    metadata = {"name": name, "namespace": "captune", "labels": labels, "creationTimestamp": STARTED}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec, "status": {"phase": phase, **more}}


def submitter(job: Object, name: str = "submitter-1", made: str = STARTED) -> Object:
    labels = {"job-name": job["metadata"]["name"], "app.kubernetes.io/component": "submitter"}
    found = pod(name, labels)
    found["metadata"]["creationTimestamp"] = made
    return found


def node(job: Object, group: str, **more: Any) -> Object:
    """A pod of the job's cluster that does not run yet."""
    labels = {
        "ray.io/cluster": f"{job['metadata']['name']}-x7k2p",
        "ray.io/node-type": "head" if group == "head" else "worker",
        "captune.dev/group": group,
    }
    return pod(f"{job['metadata']['name']}-{group}-abcde", labels, "Pending", **more)


def well(job: Object) -> list[Object]:
    """Frames of a RayJob that runs and succeeds."""
    lines = [f"{job['metadata']['name']}: 980/980 rows"]
    pods = {"pods": [submitter(job, f"{job['metadata']['name']}-s")], "logs": {f"{job['metadata']['name']}-s": lines}}
    return [{"status": status(job, "Running", "RUNNING"), **pods}, {"status": status(job, "Complete", "SUCCEEDED")}]


def fine(preflight: Object, ends: str = "Complete", line: str = "preflight: nothing stands in the way") -> list[Object]:
    """Frames of the preflight's Job."""
    name = preflight["metadata"]["name"]
    pods = {"pods": [pod(f"{name}-p", {"job-name": name})], "logs": {f"{name}-p": line.splitlines()}}
    done = {"type": ends, "status": "True", "reason": "Ended", "message": "Job has reached its end"}
    return [{"status": {"active": 1}, **pods}, {"status": {"conditions": [done]}, **pods}]


def play(stage: Stage, wanted: launch.Plan, **others: list[list[Object]]) -> None:
    """Everything goes well, but what `others` says of a workload."""
    plays = {f"job/{wanted.preflight['metadata']['name']}": others.pop("preflight", [fine(wanted.preflight)])}
    for job, title in zip(wanted.jobs, wanted.titles, strict=True):
        plays[f"rayjob/{job['metadata']['name']}"] = others.pop(title.split()[0], [well(job)])
    assert not others
    for frames in [frame for found in plays.values() for frame in found]:
        for frame in frames:
            for each in frame.get("pods", []):
                assert schemas.errors(each) == []
    for job in wanted.jobs:
        for frames in plays[f"rayjob/{job['metadata']['name']}"]:
            for frame in frames:
                assert schemas.errors({**job, "status": frame["status"]}) == []
    stage.play(plays)


def run_it(*more: str) -> int:
    return cli.main(["k8s", "run", "--recipe", "mine.yaml", "--overlay", "kind", *more])


def test_what_the_cluster_lacks_is_said_before_anything_is_applied(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.answer("secret", [])
    play(stage, plan())
    assert run_it("--whole") == 2
    told = capsys.readouterr().err
    assert "secret captune-ray-token: not there; kubectl -n captune create secret generic captune-ray-token" in told
    assert stage.order() == []


@pytest.mark.usefixtures("trusted")
def test_a_preflight_that_refuses_ends_it_before_any_cluster(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = plan()
    sentence = "caption.model: /models/blip3 is not there"
    play(stage, wanted, preflight=[fine(wanted.preflight, "Failed", f"looking\ncaptune: error: {sentence}")])
    assert run_it("--whole") == 2
    assert sentence in capsys.readouterr().err
    assert stage.applied("Job") and stage.applied("RayJob") == []


@pytest.mark.usefixtures("trusted")
def test_it_says_why_it_waits_and_gives_up_with_the_job_suspended(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = plan()
    (job,) = wanted.jobs
    head = {
        "name": "c",
        "image": "captune:0.1.0",
        "imageID": "",
        "ready": False,
        "restartCount": 0,
        "state": {"waiting": {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "captune:0.1.0"'}},
    }
    told = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu. preemption: 0/1 nodes are available."
    room = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": told}
    waits = {
        "status": status(job, "Initializing"),
        "pods": [node(job, "head", containerStatuses=[head]), node(job, "train", conditions=[room])],
    }
    play(stage, wanted, run=[[waits]])
    assert run_it("--whole", "--patience", "0") == 1
    said = capsys.readouterr().err
    assert 'the head cannot have its image: Back-off pulling image "captune:0.1.0"' in said
    assert "group train waits for nvidia.com/gpu: it asks for 1 nvidia.com/gpu, and 0/1 nodes" in said
    assert "preemption" not in said
    assert said.count("run: group train waits") == 1, "a cause is said once"
    assert "was suspended" in said
    assert stage.objects("RayJob")[0]["spec"]["suspend"] is True


@pytest.mark.usefixtures("trusted")
def test_a_failed_attempt_is_told_and_its_log_outlives_it(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = plan()
    (job,) = wanted.jobs
    first, second = submitter(job), submitter(job, "submitter-2", "2026-11-27T08:10:00Z")
    sentence = "captune: failed: train enhanced: a worker died twice at step 8"
    frames = [
        {"status": status(job, "Running", "RUNNING"), "pods": [first], "logs": {"submitter-1": ["step 7", sentence]}},
        {"status": status(job, "Running", "FAILED"), "pods": [first]},
        {"status": status(job, "Retrying", failed=1)},
        {"status": status(job, "Initializing", failed=1)},
        {"status": status(job, "Running", "RUNNING", 1), "pods": [second], "logs": {"submitter-2": ["step 9"]}},
        {"status": status(job, "Complete", "SUCCEEDED", 1), "pods": [second]},
    ]
    play(stage, wanted, run=[frames])
    assert run_it("--whole") == 0
    assert "attempt 1 of 4 failed: train enhanced: a worker died twice at step 8" in capsys.readouterr().err
    (file,) = Path("runs/mine/logs").glob("*-run.log")
    assert file.read_text().splitlines() == ["step 7", sentence, "step 9"]


@pytest.mark.usefixtures("trusted")
def test_a_failure_is_the_jobs_own_last_sentence_and_the_same_command_begins_anew(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = plan()
    (job,) = wanted.jobs
    message = "Job entrypoint command failed with exit code 1, last available logs (truncated to 20,000 chars)"
    over = {"status": status(job, "Failed", "FAILED", 4, reason="AppFailed", message=message)}
    pods = {"status": status(job, "Running", "RUNNING", 3), "pods": [submitter(job)]}
    full, wrong = "the disk is full", "train.model: no such directory"
    failed = [pods | {"logs": {"submitter-1": [f"captune: failed: {full}", "after it"]}}, over]
    refused = [pods | {"logs": {"submitter-1": [f"captune: error: {wrong}"]}}, over]
    play(stage, wanted, run=[failed, refused, well(job)])
    for code, sentence in ((1, full), (2, wrong)):
        assert run_it("--whole") == code
        assert capsys.readouterr().err.splitlines()[-1].endswith(f"{job['metadata']['name']}: {sentence}")
    assert run_it("--whole") == 0
    assert stage.applied("RayJob") == [job["metadata"]["name"]] * 3
    assert run_it("--whole") == 0, "and again, when all is done"
    assert stage.applied("RayJob") == [job["metadata"]["name"]] * 3


def test_a_run_is_a_job_for_each_stage_which_ctrl_c_leaves_at_work_and_the_same_command_follows(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = plan(whole=False)
    names = [job["metadata"]["name"] for job in wanted.jobs]
    assert len(names) == len(render.stages(recipe())) == 6
    play(stage, wanted, refine=[well(wanted.jobs[1])[:1]])
    said = _interrupted(Path("runs/mine/logs") / f"{names[1]}.log")
    assert f"{names[1]} works on in the cluster; the same command follows it again" in said
    assert f"kubectl -n captune delete rayjob {names[1]}" in said
    assert stage.applied("RayJob") == names[:2] and len(stage.objects("RayJob")) == 2
    order = [kind for kind, _ in stage.order() if kind in ("Job", "RayJob")]
    assert order == ["Job", "RayJob", "RayJob"], "the preflight comes before any cluster"
    dry = next(call for call in stage.told() if "--dry-run=server" in call["words"])
    assert len(json.loads(dry["given"])["items"]) == len(wanted.objects) - 1, "all but the namespace, which is there"

    play(stage, wanted)
    assert run_it() == 0
    told = capsys.readouterr()
    assert f"{wanted.titles[0]}: done before" in told.err and f"at work already as {names[1]}" in told.err
    assert stage.applied("RayJob") == names, "nothing is applied twice"
    assert len(stage.applied("Job")) == 1, "what is at work has passed the preflight"
    assert Path("runs/mine/report/index.html").read_text() == "report of runs/mine"
    assert f"{names[-1]}: 980/980 rows" in told.out and "open runs/mine/report/index.html" in told.err
    assert Path(f"runs/mine/logs/{names[-1]}.log").read_text() == f"{names[-1]}: 980/980 rows\n"
    applied = [each for call in stage.told() if call["given"] for each in json.loads(call["given"]).get("items", [])]
    (reader,) = [each for each in applied if each["kind"] == "Pod"]
    assert schemas.errors(reader) == [] and stage.objects("Pod") == [], "the pod that read the report is gone"


def _interrupted(until: Path) -> str:
    """What `captune k8s run` says that gets a Ctrl-C once there is something in a log."""
    # A shell's background jobs ignore Ctrl-C, and so do their children: as at a terminal, this one does not.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from k8s import follow; from ray_jobs import cli; follow.EVERY_S = 0.05; raise SystemExit(cli.main())"
    words = [sys.executable, "-c", code, "k8s", "run", "--recipe", "mine.yaml", "--overlay", "kind"]
    call = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (until.exists() and until.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        call.send_signal(signal.SIGINT)
        _, said = call.communicate(timeout=120)
    finally:
        call.kill()
    assert call.returncode == 130, said
    return said


@pytest.mark.usefixtures("trusted")
def test_a_job_of_another_recipe_is_left_alone(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = plan()
    (job,) = wanted.jobs
    other = json.loads(json.dumps(job))
    other["metadata"]["annotations"][render.DIGEST] = "another"
    stage.have(other)
    play(stage, wanted, run=[well(job)[:1]])
    assert run_it("--whole") == 2
    said = capsys.readouterr().err
    assert "is at work for another recipe (Running)" in said and "give this recipe a run_dir of its own" in said
    assert stage.order() == []


@pytest.mark.usefixtures("trusted")
def test_a_report_of_this_machine_is_not_overwritten(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/recipe.yaml").write_text("")
    play(stage, plan())
    assert run_it("--whole") == 2
    assert "runs/mine holds a run of this machine" in capsys.readouterr().err
    assert stage.told() == []
