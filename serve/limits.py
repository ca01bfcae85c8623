"""How often a key may ask, counted for all proxies of the cluster together."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from serve.errors import ApiError
from serve.keys import Key

_ACTOR, _NAMESPACE = "CAPTUNE_LIMITS", "serve"
_MINUTE_S = 60.0


class Ledger:
    """The moments of the last minute's requests by name of their key."""

    def __init__(self) -> None:
        self.taken: dict[str, deque[float]] = {}

    def take(self, name: str, most: int, now: float | None = None) -> float:
        """Count one request; 0, or how many seconds must pass before it may come, uncounted."""
        now = time.monotonic() if now is None else now
        taken = self.taken.setdefault(name, deque())
        while taken and now - taken[0] >= _MINUTE_S:
            taken.popleft()
        if len(taken) >= most:
            return _MINUTE_S - (now - taken[0])
        taken.append(now)
        return 0.0


class Limits:
    """Asks the cluster's one ledger, an actor that lives as long as Ray Serve; it is started when a key has a limit."""

    def __init__(self) -> None:
        self._ledger: Any = None

    async def take(self, key: Key) -> None:
        """Count a request of this key.

        Raises:
            ApiError: 429 with `Retry-After`: it has asked often enough this minute.
        """
        if not key.requests_per_minute:
            return
        wait_s = await self._asked(key)
        if wait_s > 0:
            said = f"the API key of '{key.name}' may ask {key.requests_per_minute} times a minute"
            raise ApiError(429, said, code="rate_limit_exceeded", wait_s=int(wait_s) + 1)

    async def _asked(self, key: Key) -> float:
        from ray.exceptions import RayActorError

        try:
            return float(await self._actor().take.remote(key.name, key.requests_per_minute))
        except RayActorError:  # its node has gone; another starts with an empty page
            self._ledger = None
            return float(await self._actor().take.remote(key.name, key.requests_per_minute))

    def _actor(self) -> Any:
        import ray

        if self._ledger is None:
            options = {"name": _ACTOR, "namespace": _NAMESPACE, "lifetime": "detached", "get_if_exists": True}
            self._ledger = ray.remote(Ledger).options(num_cpus=0, max_restarts=-1, **options).remote()
        return self._ledger


def end() -> None:
    """Let the ledger go, where there is one."""
    import ray

    try:
        ray.kill(ray.get_actor(_ACTOR, namespace=_NAMESPACE))
    except ValueError:
        return
