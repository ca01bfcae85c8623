"""A run directory without the work: real records, manifests, scores and comparisons around invented models.

Also a command, to look at the page: `python -m tests.pipelines.report.synthetic_run DIR [SEEDS]`.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipelines.attribution import explanation
from pipelines.attribution.causes import Cause, Ledger, alone
from pipelines.attribution.plan import plan
from pipelines.evaluate import compare, stage, statistics, textvqa
from pipelines.evaluate.benchmark import Prediction
from pipelines.evaluate.config import CompareConfig, EvaluateConfig
from pipelines.manifest import open_stage, write_json
from pipelines.records import Record, new_record, write_shard
from pipelines.sample.language import caption, human_answers, pick_question, poor_caption
from pipelines.sample.scene import Scene, draw_scenes, jpeg
from pipelines.text import text_metrics

SCRIPT = "<script>alert('caption')</script>"
ONERROR = '"><img src=x onerror=alert(1)>'
PROCESS = [{"words_num_filter": {"min_num": 4}}, {"word_repetition_filter": {"rep_len": 3, "max_ratio": 0.4}}]
SKILL = {"original": 0.35, "enhanced": 0.62, "filtered": 0.41, "recaptioned": 0.55, "none": 0.38}
NEW_CAPTIONS, FILTERED = ("enhanced", "recaptioned"), ("enhanced", "filtered")
TWO, FIVE = ("original", "enhanced"), ("original", "filtered", "recaptioned", "enhanced", "none")


def build(
    root: Path, *, rows: int = 40, questions: int = 60, seeds: Sequence[int] = (0,), arms: Sequence[str] = TWO
) -> Path:
    """Write a finished run of arms `original` and `enhanced`, or of five with a control; returns its directory."""
    run = root / "run"
    recipe = {
        "run_dir": str(run),
        "seeds": list(seeds),
        "arms": {arm: {"align": "none"} if arm == "none" else {"text": _text(arm)} for arm in arms},
        "train": {"model": str(root / "models" / "mgm"), "align": {"steps": 60}, "instruct": {"steps": 40}},
        "evaluate": {"benchmark": "textvqa"},
        "compare": {"baseline": "original", "seed": 0},
    }
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    records = _captions(root, run / "captions", rows)
    for arm in arms:
        if arm != "none":
            _refine(run / arm / "dataset", records, arm)
    annotations, images = _questions(root / "textvqa", questions)
    comparisons = {}
    for seed in seeds:
        evaluations = {}
        for arm in arms:
            place = run / (arm if len(seeds) == 1 else f"{arm}-seed{seed}")
            _train(place, arm, seed)
            evaluations[arm] = place / "predictions" / "textvqa"
            _evaluate(evaluations[arm], annotations, images, arm, seed)
        output = run if len(seeds) == 1 else run / f"comparison-seed{seed}"
        comparisons[seed] = compare.run(evaluations, output, CompareConfig(resamples=400))
    if len(seeds) > 1:
        summary = compare.summarise(list(comparisons.values()), CompareConfig(resamples=400))
        entries = [{**found, "seed": seed} for seed, found in comparisons.items()]
        write_json(run / "comparison.json", {**comparisons[seeds[0]], "summary": summary, "seeds": entries})
    return run


def _text(arm: str) -> str:
    return "recaption" if arm in NEW_CAPTIONS else "caption"


def explain(run: Path) -> None:
    """The gain of `enhanced`, split over captions, a filter that matters and one that does not, from the run's arms."""
    nothing = np.array(range(40), dtype=np.uint64)
    causes = [
        Cause("captions", "captions"),
        Cause("word_repetition_filter", "filter", (0,)),
        Cause("idle", "filter", (1,)),
    ]
    rows = {each: nothing + 100 * (0 in each) for each in alone(causes)}
    rows |= {each: kept[3:] for each, kept in rows.items() if 1 in each}
    asked = plan(Ledger(causes, rows), [], 8, 0)
    places = {(): "original", (0,): "recaptioned", (1,): "filtered", (0, 1): "enhanced"}
    found = {frozenset(each): stage.read_scores(run / arm / "predictions" / "textvqa") for each, arm in places.items()}
    questions = next(iter(found.values()))["questions"]
    measured = explanation.Measured(
        baseline="original",
        arm="enhanced",
        benchmark="textvqa",
        drawn=False,
        seeds=[0],
        scores={
            each: np.array([[float(row["score"]) for row in scores["questions"]]]) for each, scores in found.items()
        },
        pictures=statistics.Pictures.named([row["image_id"] for row in questions]),
        sources={each: [] for each in found},
        trained=0,
    )
    place = run / "explain" / "enhanced" / "explanation.json"
    write_json(place, explanation.explain(asked, measured, CompareConfig(resamples=400)))


def _captions(root: Path, output: Path, rows: int) -> list[Record]:
    """Records by file, as bytes, broken, twice, and with captions that mean harm."""
    output_stage = open_stage(output, "caption", {"model": "blip2", "rows": rows})
    rng, records = random.Random("captions"), []
    images = root / "images"
    images.mkdir(parents=True)
    for number, scene in enumerate(draw_scenes("pairs", rows, 0)):
        data, path = jpeg(scene, 0), images / f"{number:06d}.jpg"
        path.write_bytes(data)
        poor = SCRIPT if number == 1 else poor_caption(scene, rng)
        record = new_record(poor, image_uri=str(path), content=data, meta={"id": number})
        if number % 4 == 1:  # the bytes themselves, as from a tar
            record = new_record(poor, image=data)
        if number % 20 == 3:
            path.write_bytes(data[:200])
            record = new_record(poor, image_uri=str(path), content=data[:200], error="broken image: OSError: truncated")
        elif number % 20 == 4:
            path.unlink()
            record = new_record(poor, image_uri=str(path), error=f"missing file: {path}")
        record["recaption"] = None if record["error"] else _new_caption(scene, number)
        records.append(record)
    records.append({**records[0], "meta": json.dumps({"duplicate_of": records[0]["sample_id"]})})
    write_shard(output / "part-00000.parquet", records[: rows // 2])
    write_shard(output / "part-00001.parquet", records[rows // 2 :])
    failed = Counter(record["error"].split(":")[0] for record in records if record["error"])
    output_stage.finish(
        rows_in=len(records),
        rows_out=len(records),
        captioned=len(records) - sum(failed.values()) - 1,
        failed=dict(failed),
        duplicates=1,
        model={"path": str(root / "models" / "blip2"), "identity": "c0ffee" * 5},
        input={"path": str(root / "dataset.jsonl"), "format": "datajuicer"},
        images_per_second=48.2,
    )
    return records


def _new_caption(scene: Scene, number: int) -> str:
    if number % 25 == 9:
        return "a sign a sign a sign a sign a sign a sign"
    return f"{caption(scene)} {ONERROR}" if number == 2 else caption(scene)


def _refine(output: Path, records: list[Record], arm: str) -> None:
    """What the refine stage writes; its verdicts are imitated, its files and metrics are not."""
    text, process = _text(arm), PROCESS if arm in FILTERED else []
    refined = open_stage(output, "refine", {"input": "captions", "text": text, "process": process})
    seen: set[str] = set()
    steps = ["error", "empty_text", "duplicate", *(next(iter(entry)) for entry in process)]
    kept, rejected, by_step, reasons = [], [], Counter[str](), Counter[str]()
    for record in records:
        step, reason = _verdict(record, text, arm, seen)
        seen.add(record["sample_id"])
        record = Record(**{**record, "keep": step is None, "reject_reason": reason})
        (kept if step is None else rejected).append(record)
        if step:
            by_step[step] += 1
            reasons[f"error: {record['error'].split(':')[0]}" if record["error"] else step] += 1
    write_shard(output / "part-00000.parquet", kept)
    write_shard(output / "rejects" / "part-00000.parquet", rejected)
    facts = {"arm": arm, "text": text, "rows_in": len(records), "kept": len(kept), "rejected": len(rejected)}
    facts["retention"] = round(len(kept) / len(records), 6)
    funnel, left = [], len(records)
    for step in steps:
        funnel.append({"step": step, "rows_in": left, "rows_out": left - by_step[step], "rejected": by_step[step]})
        left -= by_step[step]
    quality = {
        "before": text_metrics([record["caption"] for record in records]),
        "after": text_metrics([record[text] or "" for record in kept]),  # type: ignore[literal-required]
    }
    write_json(output / "metrics.json", {**facts, "funnel": funnel, **quality, "reject_reasons": dict(reasons)})
    refined.finish(**facts)


def _verdict(record: Record, text: str, arm: str, seen: set[str]) -> tuple[str | None, str | None]:
    words = record[text] or ""  # type: ignore[literal-required]
    if record["error"]:
        return "error", f"error: {record['error']}"
    if record["sample_id"] in seen:
        return "duplicate", "duplicate"
    if arm in FILTERED and words.count("a sign") > 2:
        return "word_repetition_filter", "word_repetition_filter: word_rep_ratio=0.7273"
    return None, None


def _train(place: Path, arm: str, seed: int) -> None:
    rng = random.Random(f"{arm}/{seed}")
    adapter = open_stage(
        place / "adapter", "train", {"config": {"strategy": "ddp"}, "model": "feed" * 8, "arm": arm, "seed": seed}
    )
    lines = []
    for phase, steps, top, rate in (("align", 60, 5.0, 1e-3), ("instruct", 40, 2.5, 2e-4)):
        for step in range(1, steps + 1):
            rough = 1.7 if arm == "original" else 1.0
            loss = top * math.exp(-2.2 * step / steps / rough) + rng.gauss(0, 0.12 * rough)
            norm = 9 * rough * math.exp(-3 * step / steps) * rng.uniform(0.6, 1.6) + 0.1
            lines.append({"phase": phase, "step": step, "loss": loss, "grad_norm": norm})
            lines[-1]["learning_rate"] = rate * min(step / 3, (1 + math.cos(math.pi * step / steps)) / 2)
            lines[-1] |= {"samples_per_second": 80 + rng.gauss(0, 5), "seconds": round(step * 0.4, 3)}
            lines[-1] |= {"clipped": norm > 1.0, "peak_memory_gib": 14.2 + step / 1000}
            if step in (1, steps) or step % 10 == 0:
                lines[-1]["held_out_loss"] = 3.1 * math.exp(-1.1 * step / steps / rough) + rng.uniform(0, 0.05)
    (place / "adapter" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    took = {"trainable_share": 0.0082, "peak_memory_gib": 14.26, "tokens_per_second": 21_400.0, "mfu": 0.41}
    phases = {
        "align": {"steps": 60, "batch": 32, "rows": 900, **took},
        "instruct": {"steps": 40, "batch": 128, "rows": 400, **took},
    }
    adapter.finish(
        rows_in={"align": 900, "instruct": 400},
        phases=phases,
        training_seconds={"align": 25.0, "instruct": 15.0},
        workers=1,
        seed=seed,
    )
    merged = open_stage(place / "merged", "merge", {"arm": arm, "seed": seed})
    merged.finish(max_logit_difference=3.1e-6, merged_tensors=61, lora=True)


def _questions(root: Path, number: int) -> tuple[Path, Path]:
    rng, entries = random.Random("questions"), []
    images = root / "train_images"
    images.mkdir(parents=True)
    for i, scene in enumerate(draw_scenes("validation", number, 0)):
        (images / f"{i:04x}.jpg").write_bytes(jpeg(scene, 0))
        asked = pick_question(scene, rng)
        text = f"{asked.text} {SCRIPT}" if i < 3 else asked.text
        entry = {"question_id": 100 + i, "image_id": f"{i:04x}", "question": text}
        entries.append({**entry, "answers": human_answers(asked, rng)})
    write_json(root / "val.json", {"data": entries})
    return root / "val.json", images


def _evaluate(output: Path, annotations: Path, images: Path, arm: str, seed: int) -> None:
    evaluated = open_stage(output, "evaluate", {"model": f"{arm}-{seed}"})
    questions, rng = textvqa.load(annotations), random.Random(f"{arm}/{seed}/answers")
    said = {q.id: Prediction(q.id, q.answers[0] if rng.random() < SKILL[arm] else ONERROR) for q in questions}
    textvqa.write_predictions(output, EvaluateConfig(), questions, said, arm)
    scores: dict[str, Any] = stage.score("textvqa", annotations, output / "predictions.jsonl")
    model = {"model": f"{arm}-{seed}", "answered_by": {"name": f"/models/{arm}", "endpoint": None}}
    scores |= {"ocr_tokens": False, "max_new_tokens": 16, "images": str(images), **model}
    scores["conditions"] = textvqa.conditions(EvaluateConfig())
    write_json(output / "scores.json", scores)
    facts = {key: value for key, value in scores.items() if key not in stage.NOT_FACTS}
    evaluated.finish(rows_in=len(questions), rows_out=len(questions), **facts)


if __name__ == "__main__":
    chosen = tuple(range(int(sys.argv[2]))) if len(sys.argv) > 2 else (0,)
    made = build(Path(sys.argv[1]), rows=300, questions=300, seeds=chosen, arms=FIVE)
    if len(chosen) == 1:
        explain(made)
    print(made)
