"""What a gateway refuses, as exceptions: one class a kind of status."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


class GatewayError(RuntimeError):
    """The gateway refused or failed. ``status`` None: it was never reached, or a stream broke.

    ``status`` below 400: what answered there doesn't look like a gateway.
    ``code``, ``param`` and ``type`` are those of the error's body; ``request_id`` finds the request
    in the gateway's log; ``retry_after`` is in seconds, where the gateway names a time.
    """

    def __init__(
        self,
        message: str,
        status: int | None = None,
        *,
        detail: Mapping[str, Any] | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        """``detail``: the ``error`` object of the body."""
        super().__init__(message if status is None else f"{status}: {message}")
        detail = detail or {}
        self.status = status
        self.type: str | None = detail.get("type")
        self.code: str | None = detail.get("code")
        self.param: str | None = detail.get("param")
        self.request_id = request_id
        self.retry_after = retry_after


class ConnectionFailed(GatewayError):
    """The gateway can't be reached, or the connection broke."""


class InvalidRequest(GatewayError):
    """400, 413, 422: the request is wrong, or the LLM refused it."""


class AuthenticationError(GatewayError):
    """401: no valid key."""


class PermissionDenied(GatewayError):
    """403: the key has no right to that."""


class NotFound(GatewayError):
    """404: no such pool, memory, retriever or generation, or none that the key may read."""


class ConflictError(GatewayError):
    """409: the generation is damaged."""


class Overloaded(GatewayError):
    """429: beyond the key's rate, or the gateway is busy."""


class Unavailable(GatewayError):
    """503: a part of the gateway isn't ready, such as its LLM."""


_KINDS: dict[int, type[GatewayError]] = {
    400: InvalidRequest,
    401: AuthenticationError,
    403: PermissionDenied,
    404: NotFound,
    409: ConflictError,
    413: InvalidRequest,
    422: InvalidRequest,
    429: Overloaded,
    503: Unavailable,
}


def error_of(status: int, body: bytes, headers: Mapping[str, str]) -> GatewayError:
    """The exception that a reply of status 400 or more stands for."""
    try:
        detail = dict(json.loads(body)["error"])
        message = str(detail["message"])
    except (ValueError, TypeError, KeyError):  # not from our gateway: a proxy's page, say
        detail, message = {}, body[:200].decode(errors="replace") or "no reason given"
    try:
        retry_after: float | None = float(headers["retry-after"])
    except (KeyError, ValueError):
        retry_after = None
    if retry_after is not None and not retry_after >= 0:  # nobody can sleep that long, nor NaN
        retry_after = None
    return _KINDS.get(status, GatewayError)(
        message,
        status,
        detail=detail,
        request_id=headers.get("x-request-id"),
        retry_after=retry_after,
    )
