"""`captune caption` through Ray Data against the engine alone, with the same model and pictures, where Ray is."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

from .captions import LONGEST, Captions
from .run import Run

ROOT = Path(__file__).resolve().parents[3]


def stage(run: Run, captions: Captions, out: Path) -> None:
    """Rows a second of the whole command; and the engine's own rate is the `captions.engine` line."""
    if importlib.util.find_spec("ray") is None:
        run.note("stage", skipped="no Ray here: see tests/bench/GPU.md for carrying one")
        return
    import bench_caption_engine_gpu as bench
    from transformers import Blip2Processor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    side = captions.config.vision_config.image_size
    model, rows = out / "blip2", 24 if run.tiny else 4000
    captions.model.save_pretrained(model)
    Blip2Processor(
        BlipImageProcessorPil(size={"height": side, "width": side}), captions.tokenizer,
        num_query_tokens=captions.config.num_query_tokens,
    ).save_pretrained(model)  # fmt: skip
    pictures = out / "images"
    pictures.mkdir(exist_ok=True)
    for number, data in enumerate(bench.jpegs(64, 160 if run.tiny else 640)):
        (pictures / f"{number}.jpg").write_bytes(data)
    lines = (json.dumps({"images": [str(pictures / f"{row % 64}.jpg")], "text": f"{row}"}) for row in range(rows))
    (out / "dataset.jsonl").write_text("\n".join(lines) + "\n")
    options = ["--caption.batch_size", str(captions.slots), "--caption.max_new_tokens", str(LONGEST)]
    if not run.tiny:
        options += ["--caption.dtype", "bfloat16", "--caption.gpus_per_actor", "1"]
    command = [sys.executable, str(ROOT / "ray_jobs" / "caption.py"), "--input", str(out / "dataset.jsonl"),
               "--output", str(out / "captions"), "--caption.model", str(model), *options]  # fmt: skip
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=max(60.0, run.left()))
    assert done.returncode == 0, done.stderr[-600:]
    seconds = time.perf_counter() - start
    run.note("stage", rows=rows, seconds=seconds, rows_per_s_start_included=rows / seconds)
