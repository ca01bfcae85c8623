"""Asks an OpenAI-compatible endpoint many questions at once; every answer is on disk as soon as it is here."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipelines.errors import UserError, WorkFailed
from pipelines.evaluate.answerer import Answerer, answerer_at
from pipelines.evaluate.benchmark import Prediction
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.service import Reply, Service
from pipelines.files import write_text
from pipelines.progress import Progress

_SUFFIX_TYPES = {".jpg": "jpeg", ".jpeg": "jpeg", ".png": "png", ".webp": "webp", ".gif": "gif"}


@dataclass(frozen=True)
class Ask:
    """One request: the prompt and the picture that goes before it."""

    id: str
    prompt: str
    image: Path | None


def ask_all(
    asks: Sequence[Ask],
    endpoint: str,
    answerer: Answerer,
    config: EvaluateConfig,
    journal: Path,
    *,
    what: str = "evaluate",
) -> dict[str, Prediction]:
    """Answers by id; a request that the endpoint refuses or cannot answer carries its error.

    What `journal` already holds is not asked again, except failed requests. Greedy (`temperature` 0), so that asking
    again gives the same answers.

    Args:
        answerer: who answers at `endpoint`; an answer of another model ends the work.

    Raises:
        UserError: the endpoint refuses whatever is asked.
        WorkFailed: the endpoint went away, answers nothing any more, or with another model; the journal keeps what was
            answered, and the same call continues.
    """
    done = answered(journal)
    done = {ask.id: done[ask.id] for ask in asks if ask.id in done}
    rest = [ask for ask in asks if ask.id not in done]
    with Progress(len(asks), what, "questions") as progress:
        progress.start_at(len(done))
        if rest:
            _rewrite(journal, done)
            with journal.open("a", encoding="utf-8") as stream:
                client = _Client(answerer, config, stream, progress, next(iter(done.values()), None))
                try:
                    asyncio.run(client.run(rest, endpoint))
                except _AnotherModel:
                    _rewrite(journal, done)  # nobody knows which of this call's answers are whose
                    raise
                except WorkFailed as failed:
                    raise WorkFailed(
                        f"{failed}. {client.good} answers of this run are kept; run the same command again to continue"
                    ) from failed
            done |= client.answers
    return done


def answered(journal: Path) -> dict[str, Prediction]:
    """What an earlier run got, without its failed requests; the last line may be torn where that run was killed."""
    found: dict[str, Prediction] = {}
    if not journal.exists():
        return found
    for line in journal.read_bytes().split(b"\n")[:-1]:
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # torn by a kill and then continued by a later run's line break
        found[entry["id"]] = Prediction(**entry)
    return {key: said for key, said in found.items() if said.error is None}


def _rewrite(journal: Path, done: dict[str, Prediction]) -> None:
    write_text(journal, "".join(map(_line, done.values())))


def _line(prediction: Prediction) -> str:
    return json.dumps(vars(prediction)) + "\n"


class _AnotherModel(WorkFailed):
    """The endpoint's model has changed at some time while it was asked."""


class _Client:
    """Asks with many flights, and writes down what comes back.

    Args:
        before: an answer of an earlier run, which this one continues.
    """

    def __init__(
        self,
        answerer: Answerer,
        config: EvaluateConfig,
        journal: IO[str],
        progress: Progress,
        before: Prediction | None,
    ) -> None:
        self.answerer, self.config = answerer, config
        self.journal, self.progress = journal, progress
        self.before = before
        self.answers: dict[str, Prediction] = {}
        self.good = self.failed = self.failed_in_a_row = 0

    async def run(self, asks: Sequence[Ask], endpoint: str) -> None:
        """Ask them all; `answers` has them."""
        flights = min(self.config.concurrency, len(asks))
        async with Service(endpoint, self.config, flights) as service:
            queue = iter(asks)
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(flights):
                        group.create_task(self._work(service, queue, patience=max(20, 2 * flights)))
            except BaseExceptionGroup as failed:
                raise failed.exceptions[0] from None
            try:
                same = (await answerer_at(service, self.config)).model() == self.answerer.model()
            except UserError:  # it has no model of this name any more
                same = False
        if not same:
            raise _AnotherModel(
                f"{self.answerer.endpoint}: another model is there now than when the first question was asked; none "
                "of this run's answers are kept. Run the same command again when the first model is back"
            )

    async def _work(self, service: Service, queue: Iterator[Ask], patience: int) -> None:
        """One of the flights; all draw from the same iterator."""
        for ask in queue:
            body = await asyncio.to_thread(_body, ask, self.answerer.name, self.config.max_new_tokens)
            reply = await service.send("POST", "/chat/completions", body)
            self._keep(_prediction(ask.id, reply))
            if self.failed_in_a_row >= patience:
                raise WorkFailed(f"{self.answerer.endpoint}: {patience} requests in a row failed; {reply.error}")

    def _keep(self, prediction: Prediction) -> None:
        if prediction.error is None:
            self._check_same_model(prediction)
        self.journal.write(_line(prediction))
        self.journal.flush()
        self.answers[prediction.id] = prediction
        failed = prediction.error is not None
        self.good, self.failed = self.good + (not failed), self.failed + failed
        self.failed_in_a_row = self.failed_in_a_row + 1 if failed else 0
        self.progress.update(1, f"{self.failed} failed" if self.failed else "")

    def _check_same_model(self, said: Prediction) -> None:
        """Every answer names the same model as the first one, and the one that the endpoint published."""
        self.before = self.before or said
        expected, found = self.before.system_fingerprint, said.system_fingerprint
        if found == expected and found in (None, self.answerer.identity or found):
            return
        raise WorkFailed(
            f"{self.answerer.endpoint}: another model answers now than when this evaluation began (system_fingerprint "
            f"was {self.answerer.identity or expected} and is {found})"
        )


def _body(ask: Ask, model: str, max_tokens: int) -> bytes:
    parts: list[dict[str, Any]] = []
    if ask.image is not None:
        kind = _SUFFIX_TYPES.get(ask.image.suffix.lower(), "jpeg")
        encoded = base64.b64encode(ask.image.read_bytes()).decode()
        parts.append({"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{encoded}"}})
    parts.append({"type": "text", "text": ask.prompt})
    message = {"role": "user", "content": parts}
    return json.dumps({"model": model, "messages": [message], "max_tokens": max_tokens, "temperature": 0}).encode()


def _prediction(key: str, reply: Reply) -> Prediction:
    """A reply as the answer to question `key`."""
    if reply.error is not None:
        return Prediction(key, "", reply.error)
    try:
        choice = reply.content["choices"][0]
        text, end = choice["message"]["content"], choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        return Prediction(key, "", "the endpoint's answer is no chat completion")
    if not isinstance(text, str):
        return Prediction(key, "", "the endpoint's answer holds no text")
    name = reply.content.get("system_fingerprint")
    return Prediction(key, text, None, end == "length", name if isinstance(name, str) else None)
