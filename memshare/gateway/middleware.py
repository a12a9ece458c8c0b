"""What happens to every request, whatever its route: its id, its figures, its log line, its place.

Plain ASGI, so that a stream counts until its last byte.
"""

from __future__ import annotations

import re
import time
import uuid
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memshare.config import GatewayConfig
from memshare.gateway.errors import ApiError, error_of, respond
from memshare.gateway.logs import REQUEST_ID, logger, where
from memshare.gateway.metrics import Metrics

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_QUIET = frozenset({"/healthz", "/readyz", "/metrics"})  # asked every few seconds by machines
_CHAT = "/v1/chat/completions"


class Requests:
    """Gives each request an id (or takes its own), counts it, times it and logs it."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        """Wrap ``app``."""
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        status: int | None = None
        sent = Request(scope).headers.get("x-request-id", "")
        request_id = sent if _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
        token = REQUEST_ID.set(request_id)

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()), (b"x-request-id", request_id.encode())
                ]  # fmt: skip
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception as error:  # nobody expected it: here it still has its request's id
            logger.error("a request failed", extra={"failure": where(error)})
            if status is not None:
                raise  # too late to say it; the server cuts the connection
            await respond(error_of(error))(scope, receive, watched)
        finally:
            self._report(scope, status or 500, time.perf_counter() - started)
            REQUEST_ID.reset(token)

    def _report(self, scope: Scope, status: int, seconds: float) -> None:
        # The route's template, never the path itself: labels must stay few.
        route: Any = scope.get("route")
        path = getattr(route, "path", None) or "unmatched"
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self.metrics.requests.labels(method, path, str(status)).inc()
        self.metrics.request_seconds.labels(path).observe(seconds)
        if path in _QUIET:
            return
        fields: dict[str, Any] = {"method": method, "route": path, "status": status}
        caller = scope.get("state", {}).get("caller")
        if caller is not None:
            fields |= {"principal": caller.principal, "key": caller.id}
        logger.info("request", extra={**fields, "seconds": round(seconds, 6)})


class Admission:
    """Refuses at once (429) what comes while too much is being answered.

    Chats and all else are counted apart, so that a slow LLM leaves room for memories; health
    checks always pass. A request that waited instead would time out with all those behind it.
    """

    def __init__(self, app: ASGIApp, config: GatewayConfig, metrics: Metrics) -> None:
        """Wrap ``app``."""
        self.app = app
        self._limits = {True: config.max_chats, False: config.max_requests}
        self._active = {True: 0, False: 0}
        self._shed = metrics.shed
        metrics.active.labels("chat").set_function(lambda: self._active[True])
        metrics.active.labels("memory").set_function(lambda: self._active[False])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        chat = scope["path"] == _CHAT
        if self._active[chat] >= self._limits[chat]:
            self._shed.labels("busy").inc()
            error = ApiError(429, "the gateway is busy; try again", code="overloaded")
            await respond(error)(scope, receive, send)
            return
        self._active[chat] += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._active[chat] -= 1
