"""Captioning sample JPEGs with the sample BLIP-2 on two cores: the stage, a bare loop over the engine, and Data-Juicer
on Ray.

python tests/bench/bench_caption_vs_datajuicer.py [--count 2000] [--slow-count 160] [--work DIR]

    bare all pixels in memory, the engine in a process per core: what reading, decoding, Ray and writing are measured
    against generate the same pixels through transformers' own `generate`, in batches of the same size stage `captune
    caption` as it is operator Data-Juicer's Ray mode with `captune_image_captioning_mapper`: the one name changed
    datajuicer Data-Juicer's Ray mode with its `image_captioning_mapper`, defaults everywhere

All have the same model and the same decoding (sampling from the 50 likeliest, temperature 1). Every side runs twice,
over few and over many images, each time in a fresh process; its rate is that between the two, so that what a start
costs counts nowhere. The slow side gets fewer images. Data-Juicer insists on an image token at id 50265, so the sample
model's vocabulary is filled up to there, for all sides; the new tokens take the place of `<image>` in the output layer,
which the model has learnt never to say.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.blip2.config import CandidateConfig, DecodingConfig
from pipelines.caption.config import CaptionConfig
from pipelines.sample.scene import draw_scenes, jpeg
from pipelines.sample.world import MODELS

if TYPE_CHECKING:
    import numpy as np

    from pipelines.blip2.engine import BlipCaptioner

    Part = Callable[[BlipCaptioner, np.ndarray], list[str | None]]

IMAGE_ID = 50265
CORES = 2


def main() -> None:
    """Print a table, or (`--side`) be one of its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="images of the fast sides")
    parser.add_argument("--slow-count", type=int, default=160, help="images of Data-Juicer's own operator")
    parser.add_argument("--batch-size", type=int, default=CaptionConfig().slots_on("cpu"))
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument(
        "--work", type=Path, help="directory for images, models and outputs; a temporary one by default"
    )
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--images", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        seconds, captions = SIDES[args.side](args.work, args.images, args.batch_size)
        print(json.dumps({"seconds": seconds, "captions": captions}))
        return
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        prepare(work, max(args.count, args.slow_count))
        rates = {side: rate_of(side, work, args) for side in args.sides}
    for fast, slow, goal in (
        ("stage", "bare", " (goal 0.85)"),
        ("stage", "datajuicer", " (goal 3)"),
        ("operator", "datajuicer", ""),
        ("bare", "generate", ""),
    ):
        if {fast, slow} <= set(rates):
            print(f"{fast} / {slow}: {rates[fast] / rates[slow]:.2f}{goal}")


def prepare(work: Path, count: int) -> None:
    """Images, the model, and the dataset's lines."""
    (work / "images").mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(draw_scenes("pairs", count, 0)):
        (work / "images" / f"{number:06d}.jpg").write_bytes(jpeg(scene, 0))
    if not (work / "blip2" / "model.safetensors").exists():
        fill_vocabulary(MODELS / "blip2", work / "blip2")


def fill_vocabulary(source: Path, target: Path) -> None:
    """The checkpoint `source` with as many tokens as it takes to have `<image>` at Data-Juicer's id."""
    import torch
    from transformers import Blip2ForConditionalGeneration

    shutil.copytree(source, target, dirs_exist_ok=True)
    (target / "model.safetensors").unlink()
    model = Blip2ForConditionalGeneration.from_pretrained(source)
    old_id, old_size = model.config.image_token_id, model.config.text_config.vocab_size
    never_said = model.get_input_embeddings().weight[old_id].detach().clone()
    model.language_model.resize_token_embeddings(IMAGE_ID + 1, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[old_size:] = never_said
    model.config.text_config.vocab_size = IMAGE_ID + 1
    model.config.image_token_id = IMAGE_ID
    model.save_pretrained(target)

    tokenizer = json.loads((target / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary.pop("<image>")
    vocabulary |= {"<old image>": old_id, "<image>": IMAGE_ID}
    vocabulary |= {f"<unused {number}>": number for number in range(old_size, IMAGE_ID)}
    for token in tokenizer["added_tokens"]:
        if token["content"] == "<image>":
            token["id"] = IMAGE_ID
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))


def rate_of(side: str, work: Path, args: argparse.Namespace) -> float:
    """Images a second between a run over few images and one over many."""
    many = args.slow_count if side == "datajuicer" else args.count
    few = many // 10
    seconds = [_run(side, work, count, args.batch_size) for count in (few, many)]
    if seconds[1] <= seconds[0]:
        sys.exit(
            f"{side}: {few} images took {seconds[0]:.1f} s and {many} took {seconds[1]:.1f} s: the machine is "
            f"too busy to measure on"
        )
    rate = (many - few) / (seconds[1] - seconds[0])
    print(
        f"{side:<11}{few:>6} images in {seconds[0]:6.1f} s, {many:>6} in {seconds[1]:6.1f} s: {rate:8.1f} images/s",
        flush=True,
    )
    return rate


def _run(side: str, work: Path, count: int, batch_size: int) -> float:
    command = [sys.executable, __file__, "--side", side, "--images", str(count), "--work", str(work)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "RAY_worker_niceness": "0",  # the bare loop has none
        "RAY_idle_worker_killing_time_threshold_ms": "30000",  # as `captune` sets it
    }
    done = subprocess.run([*command, "--batch-size", str(batch_size)], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-4000:]}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["captions"] == count, f"{side} made {result['captions']} captions of {count} images"
    return float(result["seconds"])


def _config(work: Path, batch_size: int) -> CaptionConfig:
    """Data-Juicer's decoding; of its 128 tokens, those that the sample model's 128 positions leave."""
    return CaptionConfig(
        model=str(work / "blip2"),
        batch_size=batch_size,
        max_new_tokens=115,
        decoding=DecodingConfig(method="sample", top_k=50, top_p=1.0),
        candidates=CandidateConfig(choose="random_any"),
    )


def _dataset(work: Path, count: int) -> Path:
    path = work / f"first-{count}.jsonl"
    lines = [
        json.dumps({"text": "<__dj__image> poor <|__dj__eoc|>", "images": [str(work / "images" / f"{number:06d}.jpg")]})
        for number in range(count)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def bare(work: Path, count: int, batch_size: int) -> tuple[float, int]:
    """The engine alone: a process per core."""
    return _on_all_cores(_bare_part, work, count, batch_size)


def generate(work: Path, count: int, batch_size: int) -> tuple[float, int]:
    """Transformers alone: a process per core."""
    return _on_all_cores(_generate_part, work, count, batch_size)


def _bare_part(engine: BlipCaptioner, pixels: np.ndarray) -> list[str | None]:
    return [row.chosen for row in engine.caption(pixels)]


def _generate_part(engine: BlipCaptioner, pixels: np.ndarray) -> list[str | None]:
    import torch

    texts: list[str | None] = []
    for first in range(0, len(pixels), engine.batch_size):
        values = engine.normalize(torch.from_numpy(pixels[first : first + engine.batch_size]))
        found = engine.model.generate(pixel_values=values, do_sample=True, top_k=50, max_new_tokens=115)
        texts += engine.tokenizer.batch_decode(found, skip_special_tokens=True)
    return texts


def _on_all_cores(part: Part, work: Path, count: int, batch_size: int) -> tuple[float, int]:
    """Each core its share of the pixels, in memory and warmed up before the clock starts (two threads of one process do
    worse).
    """
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(CORES), context.Queue()
    shares = [list(range(core, count, CORES)) for core in range(CORES)]
    processes = [
        context.Process(target=_core, args=(part, work, share, batch_size, barrier, results)) for share in shares
    ]
    for process in processes:
        process.start()
    spans = [results.get() for _ in processes]
    for process in processes:
        process.join()
    starts, ends, captions = zip(*spans, strict=True)
    return max(ends) - min(starts), sum(captions)


def _core(part: Part, work: Path, share: list[int], batch_size: int, barrier: Any, results: Any) -> None:
    import torch

    from pipelines.blip2.engine import BlipCaptioner
    from pipelines.images import decode

    torch.set_num_threads(1)
    engine = BlipCaptioner(work / "blip2", _config(work, batch_size))
    pixels = engine.preprocess([decode((work / "images" / f"{number:06d}.jpg").read_bytes()) for number in share])
    part(engine, pixels[:batch_size])
    barrier.wait()
    start = time.time()
    captions = part(engine, pixels)
    results.put((start, time.time(), sum(map(bool, captions))))


def stage(work: Path, count: int, batch_size: int) -> tuple[float, int]:
    """The stage, on a local cluster: a replica per core, as the bare loop has."""
    import ray

    from pipelines.caption import stage as caption_stage
    from pipelines.records import iter_records

    ray.init(num_cpus=CORES, include_dashboard=False, log_to_driver=False, object_store_memory=500 << 20)
    output = Path(tempfile.mkdtemp(dir=work))
    start = time.perf_counter()
    config = replace(_config(work, batch_size), actors=CORES, cpus_per_actor=0.25)
    caption_stage.run(str(_dataset(work, count)), output / "captions", config)
    seconds = time.perf_counter() - start
    return seconds, sum(record["recaption"] is not None for record in iter_records(output / "captions"))


def operator(work: Path, count: int, batch_size: int) -> tuple[float, int]:
    """Data-Juicer with our operator."""
    from importlib.util import find_spec

    spec = find_spec("pipelines.caption.datajuicer_op")
    assert spec is not None and spec.origin is not None
    parameters = {"hf_img2seq": str(work / "blip2"), "keep_original_sample": False, "gpu_batch_size": batch_size}
    return _dj_process(work, count, {"captune_image_captioning_mapper": parameters}, [spec.origin])


def datajuicer(work: Path, count: int, batch_size: int) -> tuple[float, int]:
    """Data-Juicer as it is."""
    parameters = {"hf_img2seq": str(work / "blip2"), "keep_original_sample": False}
    return _dj_process(work, count, {"image_captioning_mapper": parameters}, [])


def _dj_process(work: Path, count: int, step: dict[str, object], custom: list[str]) -> tuple[float, int]:
    output = Path(tempfile.mkdtemp(dir=work))
    recipe = {
        "dataset_path": str(_dataset(work, count)), "export_path": str(output / "captions"), "work_dir": str(output),
        "executor_type": "ray", "ray_address": "local", "custom_operator_paths": custom, "process": [step],
    }  # fmt: skip
    (output / "recipe.yaml").write_text(json.dumps(recipe))
    start = time.perf_counter()
    command = [sys.executable, "-m", "data_juicer.tools.process_data", "--config", str(output / "recipe.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
    rows = [json.loads(line) for file in (output / "captions").glob("*") for line in file.read_text().splitlines()]
    return seconds, sum("poor" not in row["text"] and len(row["text"]) > 40 for row in rows)


SIDES: dict[str, Callable[[Path, int, int], tuple[float, int]]] = {
    "bare": bare,
    "generate": generate,
    "stage": stage,
    "operator": operator,
    "datajuicer": datajuicer,
}


if __name__ == "__main__":
    main()
