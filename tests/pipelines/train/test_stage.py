"""The train stage on Ray Train. Every run starts worker processes, so one undisturbed run serves several tests."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipelines.adapters.check import check_adapter
from pipelines.errors import UserError
from pipelines.formats import open_dataset
from pipelines.manifest import open_stage
from pipelines.mgm.adapter import CONFIG, NON_LORA, WEIGHTS, trained_on
from pipelines.modelfiles import model_identity
from pipelines.train import checkpoints
from pipelines.train import stage as loop
from pipelines.train.config import LoraSettings, PhaseConfig, TrainConfig
from pipelines.train.log import read_log

pytestmark = pytest.mark.timeout(1800)

ALIGN, INSTRUCT = 16, 8


def _config(instruct: Path | None, /, **settings: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "align": PhaseConfig(steps=ALIGN, learning_rate=5e-3, micro_batch=2, accumulation=2),
        "instruct": PhaseConfig(steps=INSTRUCT, learning_rate=5e-3, micro_batch=2, accumulation=2),
        "instruct_data": str(instruct) if instruct else None,
        "lora": LoraSettings(rank=4, alpha=8),
        "cpus_per_worker": 0.5,
        "checkpoint_every": 5,
        "held_out_every": 4,
        "max_failures": 1,
    }
    return TrainConfig(**{**defaults, **settings})


def _weights(output: Path) -> dict[str, torch.Tensor]:
    return {**load_file(output / WEIGHTS), **load_file(output / NON_LORA)}


@pytest.fixture(scope="module")
def data(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("data")
    refined = tiny.write_dataset(root / "refined", rows=10, broken=1)
    return {"refined": refined, "instruct": tiny.write_instructions(root / "instruct.json", rows=15, text_only=5)}


@pytest.fixture(scope="module")
def undisturbed(
    ray_cluster: None, model_dir: Path, data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("undisturbed") / "adapter"
    return output, loop.run(data["refined"], model_dir, output, _config(data["instruct"]), arm="enhanced")


@pytest.mark.heavy
def test_rows_that_show_a_benchmarks_picture_are_left_out(
    ray_cluster: None, model_dir: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    """By the file of `captune overlap`; with another one it is another training."""
    file = tmp_path / "overlap.json"

    def known(*numbers: int) -> str:
        names = [row.where for row in open_dataset(data["instruct"]).rows()]
        rows = [{"dataset": str(data["instruct"]), "row": names[number], "sample_id": ""} for number in numbers]
        file.write_text(json.dumps({"benchmark": "textvqa", "rows": rows, "contaminated": []}))
        return str(file)

    short = {"align": PhaseConfig(steps=0), "instruct": PhaseConfig(steps=2, micro_batch=2, accumulation=1)}
    config = _config(data["instruct"], **short, without=known(0, 3, 4))
    manifest = loop.run(data["refined"], model_dir, tmp_path / "adapter", config)
    assert manifest["rows_in"] == {"instruct": 17}
    assert loop.run(data["refined"], model_dir, tmp_path / "adapter", config) == manifest
    known(0, 3)
    with pytest.raises(UserError, match="another"):
        loop.run(data["refined"], model_dir, tmp_path / "adapter", config)


@pytest.mark.heavy
def test_both_phases_leave_an_adapter_and_its_history(
    undisturbed: tuple[Path, dict[str, Any]], model_dir: Path, data: dict[str, Path]
) -> None:
    """Files, manifest, log, TensorBoard and checkpoints are as promised, and checkpoints hold no base model."""
    output, manifest = undisturbed
    for name in (CONFIG, WEIGHTS, NON_LORA, "log.jsonl", "tensorboard", "checkpoints", "MANIFEST.json"):
        assert (output / name).exists(), name
    assert [(line["phase"], line["step"]) for line in read_log(output)] == [
        *(("align", step) for step in range(1, ALIGN + 1)),
        *(("instruct", step) for step in range(1, INSTRUCT + 1)),
    ]
    keys = {"phase", "step", "loss", "grad_norm", "clipped", "learning_rate", "samples_per_second", "seconds"}
    assert set(read_log(output)[1]) == keys | {"peak_memory_gib"}
    measured = [(line["phase"], line["step"]) for line in read_log(output) if "held_out_loss" in line]
    assert measured == [*(("align", n) for n in (1, 4, 8, 12, 16)), *(("instruct", n) for n in (1, 4, 8))]
    assert manifest["rows_in"] == {"align": 11, "instruct": 20}
    assert manifest["phases"]["instruct"]["held_out"] == 2  # every tenth row
    assert manifest["phases"]["align"]["stability"]["held_out"][0] == read_log(output)[0]["held_out_loss"]
    facts = manifest["phases"]["instruct"]
    assert facts["trainable_share"] == round(facts["trainable_parameters"] / facts["parameters"], 6) < 1
    assert facts["samples_per_second"] > 0 and facts["tokens_per_second"] > 16 * facts["samples_per_second"]
    assert facts["mfu"] is None and facts["peak_memory_gib"] > 0.1  # a CPU
    assert manifest["rows_broken"] == {"align": 1, "instruct": 0}
    assert list(manifest["broken"]["align"].values()) == ["not an image"]
    assert all(verdict.passed for verdict in check_adapter(output, model_dir))
    assert trained_on(output) == model_identity(model_dir)
    kept = [path for path in checkpoints.directory_of(output).iterdir() if path.is_dir()]
    assert len(kept) == 2
    trained = sum(tensor.nbytes for tensor in _weights(output).values())
    size = sum(file.stat().st_size for file in kept[0].rglob("*") if file.is_file())
    assert size < 4 * trained + 50_000  # weights and AdamW's two moments
    again = loop.run(data["refined"], model_dir, output, _config(data["instruct"], log_every=3), arm="enhanced")
    assert again == manifest  # done already: nothing starts


@pytest.mark.heavy
def test_another_setting_is_another_run(
    undisturbed: tuple[Path, dict[str, Any]], model_dir: Path, data: dict[str, Path]
) -> None:
    """An output directory of a different run is refused with the key that differs."""
    with pytest.raises(UserError, match="config.seed"):
        loop.run(data["refined"], model_dir, undisturbed[0], _config(data["instruct"], seed=1))


_DRIVER = """
import sys
from pathlib import Path
import ray
from pipelines.train import stage as loop
from pipelines.train.config import LoraSettings, PhaseConfig, TrainConfig
refined, instruct, model, output = sys.argv[1:]
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200_000_000)
align = PhaseConfig(steps={align}, learning_rate=5e-3, micro_batch=2, accumulation=2)
tune = PhaseConfig(steps={instruct}, learning_rate=5e-3, micro_batch=2, accumulation=2)
loop.run(refined, model, output, TrainConfig(align=align, instruct=tune, instruct_data=instruct,
    lora=LoraSettings(rank=4, alpha=8), cpus_per_worker=0.5, checkpoint_every=5, held_out_every=4, max_failures=1,
    tracker="mlflow"))
"""


def _wait(condition: Callable[[], Any], process: subprocess.Popen[bytes], seconds: float = 900) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        assert process.poll() is None, "the driver ended too early"
        time.sleep(0.02)
    raise AssertionError("waited in vain")


@pytest.mark.heavy
def test_a_killed_worker_and_a_killed_driver_change_nothing(
    undisturbed: tuple[Path, dict[str, Any]],
    model_dir: Path,
    data: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """kill -9 of the worker in `align`, of the driver in `instruct`, which leaves a checkpoint half copied and Ray's
    note of checkpoints empty; the same command ends with the same bits and log, says from which step, and MLflow has
    been told every step once.
    """
    import psutil
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")

    output = tmp_path / "adapter"
    arguments = [str(data["refined"]), str(data["instruct"]), str(model_dir), str(output)]
    code = _DRIVER.format(align=ALIGN, instruct=INSTRUCT)
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"})

    def reached(phase: str, step: int) -> bool:
        return any(line["phase"] == phase and line["step"] >= step for line in read_log(output))

    def worker() -> Any:
        children = psutil.Process(process.pid).children(recursive=True)
        return next((c for c in children if "RayTrainWorker" in " ".join(c.cmdline()[:1])), None)

    try:
        _wait(lambda: reached("align", 7), process)
        _wait(worker, process).send_signal(signal.SIGKILL)
        _wait(lambda: reached("instruct", 6), process)
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        psutil.wait_procs(children, timeout=60)  # a local cluster ends with its driver
    assert not (output / "MANIFEST.json").exists()
    whole = checkpoints.newest(output)
    assert whole is not None
    half = Path(shutil.copytree(whole, whole.with_name("checkpoint_9999")))
    os.truncate(half / "trained.safetensors", 100)
    os.truncate(whole.parent / "checkpoint_manager_snapshot.json", 0)
    done = sum(checkpoints.done_steps(whole).values())
    loop.run(data["refined"], model_dir, output, _config(data["instruct"], tracker="mlflow"))
    said = capsys.readouterr().err
    assert f"the last checkpoint is at step {done} of {ALIGN + INSTRUCT}" in said and not half.exists()
    assert f"train: {done}/{ALIGN + INSTRUCT} steps" in said

    expected, found = _weights(undisturbed[0]), _weights(output)
    assert set(expected) == set(found)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    kept = ("phase", "step", "loss", "grad_norm", "held_out_loss")
    curve = [[line.get(key) for key in kept] for line in read_log(undisturbed[0])]
    assert [[line.get(key) for key in kept] for line in read_log(output)] == curve
    client = MlflowClient((tmp_path / "mlruns").as_uri())
    (run,) = client.search_runs([found.experiment_id for found in client.search_experiments()])
    assert run.info.status == "FINISHED" and run.data.params["train.lora.rank"] == "4"
    for phase, steps in (("align", ALIGN), ("instruct", INSTRUCT)):
        history = client.get_metric_history(run.info.run_id, f"{phase}/loss")
        told = {metric.step: metric.value for metric in history}
        assert len(history) == steps and told == {line[1]: line[2] for line in curve if line[0] == phase}


@pytest.mark.heavy
def test_zero_shards_train_as_ddp_does(
    ray_cluster: None, model_dir: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    """ZeRO-3 on two workers of Ray Train, really on (the engine is asked): full tensors, and the weights that DDP gets.
    All strategies and mixes of rows are in test_equality.py.
    """
    results = {}
    for strategy in ("ddp", "zero3"):
        config = _config(
            data["instruct"], workers=2, strategy=strategy, precision="float32", lora=LoraSettings(rank=4, dropout=0.0)
        )
        loop.run(data["refined"], model_dir, tmp_path / strategy, config)
        assert all(verdict.passed for verdict in check_adapter(tmp_path / strategy, model_dir))
        results[strategy] = _weights(tmp_path / strategy), read_log(tmp_path / strategy)
    _same_weights(results["zero3"][0], results["ddp"][0], 1e-3)  # AdamW makes the last bit of a small gradient count
    for line, reference in zip(results["zero3"][1], results["ddp"][1], strict=True):
        assert line["loss"] == pytest.approx(reference["loss"], rel=1e-4)
        assert line["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-3)
        assert line.get("held_out_loss", 0.0) == pytest.approx(reference.get("held_out_loss", 0.0), rel=1e-4)


def _same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert set(found) == set(expected)
    apart = {n: float((found[n] - tensor).norm() / tensor.norm().clamp_min(1e-12)) for n, tensor in expected.items()}
    worst = max(apart, key=lambda name: apart[name])
    assert apart[worst] < tolerance, (worst, apart[worst])


@pytest.mark.heavy
def test_a_run_goes_on_with_another_number_of_workers(
    ray_cluster: None, model_dir: Path, data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers, one, two again: every step has the samples and the dropout that it has on two, and so have the
    weights. A number of workers that cannot make up the batch is refused with those that can.
    """
    from ray.train.v2.api.config import CheckpointConfig

    keep = CheckpointConfig.__init__
    monkeypatch.setattr(CheckpointConfig, "__init__", lambda self, num_to_keep=None: keep(self))  # keep all
    phase = PhaseConfig(steps=6, learning_rate=5e-3, micro_batch=2, accumulation=2)
    settings: dict[str, Any] = {"align": PhaseConfig(steps=0), "instruct": phase, "precision": "float32"}
    settings |= {"lora": LoraSettings(rank=4, dropout=0.2), "checkpoint_every": 2, "cpus_per_worker": 0.5}
    settings |= {"instruct_data": str(data["instruct"])}

    def run(output: Path, workers: int) -> dict[str, Any]:
        return loop.run(data["refined"], model_dir, output, TrainConfig(workers=workers, **settings))

    manifest = run(tmp_path / "whole", 2)
    assert manifest["phases"]["instruct"]["batch"] == 8
    assert run(tmp_path / "whole", 1) == manifest  # done already
    shutil.copytree(tmp_path / "whole", tmp_path / "moved")
    for workers, steps in ((1, 2), (2, 1)):
        (tmp_path / "moved" / "MANIFEST.json").unlink()
        for _ in range(steps):
            _forget_last_checkpoint(tmp_path / "moved")
        with pytest.raises(
            UserError, match="8 samples of a step do not divide into 3 worker.* workers may be 1, 2, 4$"
        ):
            run(tmp_path / "moved", 3)
        assert run(tmp_path / "moved", workers)["phases"]["instruct"]["batch"] == 8
    _same_weights(_weights(tmp_path / "moved"), _weights(tmp_path / "whole"), 1e-5)


def test_shards_stay_on_as_many_workers(tmp_path: Path) -> None:
    """The state of ZeRO cannot be dealt out anew: refused before anything starts, with the number that works."""
    first = _config(None, workers=2, strategy="zero3")
    open_stage(tmp_path / "out", "train", loop.inputs("m", {}, first), notes={"workers": 2})
    with pytest.raises(UserError, match="zero3 state of this run is sharded over 2; continue with train.workers 2"):
        loop.as_first_started(_config(None, workers=1, strategy="zero3"), tmp_path / "out")
    assert loop.as_first_started(first, tmp_path / "out") is first


@pytest.mark.heavy
def test_zero_continues_from_its_shards(
    ray_cluster: None, model_dir: Path, data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ZeRO-3 run that stopped after a checkpoint goes on from it, with the losses of an undisturbed run."""
    config = _config(None, strategy="zero3", workers=2)
    loop.run(data["refined"], model_dir, tmp_path / "whole", config)
    whole = read_log(tmp_path / "whole")
    # The state that a kill between the last two checkpoints leaves: everything but the newest one.
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    (tmp_path / "half" / "MANIFEST.json").unlink()
    _forget_last_checkpoint(tmp_path / "half")
    loop.run(data["refined"], model_dir, tmp_path / "half", config)
    assert [line["loss"] for line in read_log(tmp_path / "half")] == [line["loss"] for line in whole]
    expected, found = load_file(tmp_path / "whole" / NON_LORA), load_file(tmp_path / "half" / NON_LORA)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not (tmp_path / "half" / WEIGHTS).exists()


def _forget_last_checkpoint(output: Path) -> None:
    last = checkpoints.newest(output)
    assert last is not None
    shutil.rmtree(last)


@pytest.mark.heavy
def test_mistakes_end_with_a_message_and_no_retry(
    ray_cluster: None, model_dir: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    """A worker that finds an impossible setting says so once; Ray does not start it again."""
    config = _config(data["instruct"], lora=LoraSettings(target_modules="q_proj"))
    with pytest.raises(UserError, match="matches no module"):
        loop.run(data["refined"], model_dir, tmp_path / "out", config)
    assert not read_log(tmp_path / "out")


def test_impossible_requests_are_refused_before_ray(model_dir: Path, data: dict[str, Path], tmp_path: Path) -> None:
    """No phase at all, no such input, no such model: nothing is created."""
    with pytest.raises(UserError, match="no instruct phase"):
        loop.run(data["refined"], model_dir, tmp_path / "out", _config(None, align=PhaseConfig(steps=0)))
    with pytest.raises(UserError, match="nowhere: no such file"):
        loop.run(tmp_path / "nowhere", model_dir, tmp_path / "out", _config(None))
    with pytest.raises(UserError, match="not a model directory"):
        loop.run(data["refined"], tmp_path, tmp_path / "out", _config(None))
    assert not (tmp_path / "out").exists()
