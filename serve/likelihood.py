"""How likely a model finds the right answers: a measure of the same questions that moves before accuracy does.

Asked of the engine itself, in a task of Ray: an OpenAI-compatible endpoint has no way to ask for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines import groups
from pipelines.connection import connect
from pipelines.evaluate.benchmark import Question
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.stage import find_images, inputs, read_questions
from pipelines.manifest import MANIFEST, fingerprint, open_stage, read_json, write_json
from pipelines.modelfiles import model_identity
from pipelines.progress import say
from serve.config import ServeConfig

LIKELIHOODS = "likelihoods.json"


def run(model: Path, output: Path, config: EvaluateConfig, service: ServeConfig) -> dict[str, Any]:
    """Write `likelihoods.json`, question id -> log-likelihood of its right answer (the one that most humans gave) in
    nats, and return the manifest, with `loss`, the mean of their negatives, in it.

    Args:
        service: what one replica takes is what this takes.

    Raises:
        UserError: annotations, images or model unusable, or another run's directory.
    """
    questions = read_questions(config)
    images = find_images(config, questions)
    wanted = inputs(config, questions, images, model_identity(model))
    stage = open_stage(output, "likelihood", wanted)
    if stage.complete:
        return stage.manifest
    connect()
    import ray

    demand = service.demand()
    task = ray.remote(num_cpus=demand.cpus, num_gpus=demand.gpus, label_selector=groups.selector(demand.group))(_ask)
    said: list[float] = ray.get(task.remote(model, questions, images, service))
    ids = [question.id for question in questions]
    write_json(output / LIKELIHOODS, dict(zip(ids, said, strict=True)))
    loss = -sum(said) / len(said)
    say(f"likelihood: {loss:.3f} nats a right answer, {len(said)} questions")
    return stage.finish(rows_in=len(said), loss=loss)


def asked(output: Path, config: EvaluateConfig) -> bool:
    """Whether a model, whichever it was, has been asked these questions there."""
    manifest = read_json(output / MANIFEST) if (output / MANIFEST).is_file() else {}
    if not manifest:
        return False
    questions = read_questions(config)
    wanted = inputs(config, questions, find_images(config, questions), manifest["inputs"]["model"])
    return fingerprint(wanted) == manifest["fingerprint"]


def right_answer(question: Question) -> str:
    """The answer that most humans gave, the first of several."""
    return Counter(question.answers).most_common(1)[0][0]


def _ask(model: Path, questions: Sequence[Question], images: dict[str, Path], service: ServeConfig) -> list[float]:
    """Log-likelihoods in the order of the questions."""
    import torch
    from PIL import Image
    from transformers.utils import logging

    from serve.engine import Engine, Request

    logging.disable_progress_bar()
    torch.set_num_threads(max(1, int(service.cpus_per_replica)))
    engine = Engine(model, dtype=service.dtype)
    found: list[float] = []
    for start in range(0, len(questions), service.max_batch_size):
        batch = questions[start : start + service.max_batch_size]
        requests = [
            Request(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.prompt}]}],
                [Image.open(images[question.id]).convert("RGB")],
            )
            for question in batch
        ]
        found += engine.likelihoods(requests, [right_answer(question) for question in batch])
    return found
