"""Which model answers at an endpoint: two models must never pass for one another, nor share one evaluation."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import Any

from pipelines.errors import UserError
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.service import Gone, Service, public

_IDENTITY = re.compile(r"[0-9a-f]{32}")
_VOLATILE = ("created", "permission", "status", "state")
"""Of an entry of `/v1/models`, what says when and how rather than which: vLLM makes the first two anew for every
request, and llama.cpp loads a model with the first question."""


@dataclass(frozen=True)
class Answerer:
    """A model at an endpoint, as far as the endpoint tells.

    Attributes:
        name: what it is called in requests.
        endpoint: base URL.
        identity: of its directory (`model_identity`), which captune's own service publishes; None elsewhere.
        entry: what `/v1/models` says of it.
    """

    name: str
    endpoint: str
    identity: str | None
    entry: dict[str, Any]

    def model(self) -> str | dict[str, Any]:
        """What makes it this model and no other, for a fingerprint: the identity where there is one. Elsewhere all
        that is known counts, the address too: two services may call different models by one name.
        """
        return self.identity or {"name": self.name, "endpoint": self.endpoint, "entry": self.entry}


def who_answers(endpoint: str, config: EvaluateConfig) -> Answerer:
    """Ask the endpoint.

    Raises:
        UserError: it is no OpenAI-compatible endpoint, or `evaluate.model` is not there, or is not named and there are
            several.
        WorkFailed: nobody is there.
    """

    async def ask() -> Answerer:
        async with Service(endpoint, config) as service:
            return await answerer_at(service, config)

    return asyncio.run(ask())


async def answerer_at(service: Service, config: EvaluateConfig) -> Answerer:
    """`who_answers`, with connections that are there already."""
    place = public(service.base)
    try:
        reply = await service.send("GET", "/models")
    except Gone as gone:
        if gone.status is None:
            raise
        raise UserError(f"{place}/models: {gone}; is this an OpenAI-compatible endpoint?") from None
    if reply.error is not None:
        raise UserError(f"{place}/models: {reply.error}; is this an OpenAI-compatible endpoint?")
    data = reply.content.get("data") if isinstance(reply.content, dict) else None
    if not isinstance(data, list) or not all(isinstance(entry, dict) and "id" in entry for entry in data):
        raise UserError(f"{place}/models: not the answer of an OpenAI-compatible endpoint")
    entry = _chosen({str(entry["id"]): entry for entry in data}, place, config.model)
    identity = entry.get("identity")
    own = isinstance(identity, str) and _IDENTITY.fullmatch(identity)
    kept = {key: value for key, value in entry.items() if key not in _VOLATILE}
    return Answerer(str(entry["id"]), place, str(identity) if own else None, kept)


def _chosen(entries: dict[str, dict[str, Any]], place: str, wanted: str) -> dict[str, Any]:
    if wanted in entries:
        return entries[wanted]
    if wanted or len(entries) != 1:
        lacks = f"has no model '{wanted}'" if wanted else "has not exactly one model"
        raise UserError(f"{place} {lacks}; set evaluate.model to one of: {', '.join(entries) or '(none)'}")
    return next(iter(entries.values()))
