"""Refusals and failures in the form that OpenAI's clients read."""

from __future__ import annotations

from typing import Any

_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A refusal that reaches the client as an OpenAI error body.

    Args:
        param: the field of the request that it is about.
        code: what programs tell refusals apart by.
        wait_s: `Retry-After`, in seconds.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, wait_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.wait_s = status, message, param, code, wait_s

    def body(self) -> dict[str, Any]:
        """`{"error": {...}}` as OpenAI's clients expect it."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """When to come again, where that is known."""
        return {} if self.wait_s is None else {"retry-after": str(self.wait_s)}
