"""Reading requests: who calls, then the body, bounded while it arrives, strict UTF-8 and JSON.

Python's json takes more than JSON has (NaN, lone surrogates, numbers beyond a double) and all of
that would break later: in the store, or when a reply is written. Here it is a 400 at the door.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from memshare.gateway.access import Access
from memshare.gateway.errors import ApiError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_MAX_DEPTH = 64
# Brackets, and strings to skip: possessive, and an unterminated one runs to the end, so that no
# text makes this quadratic.
_TOKEN = re.compile(r'"(?:[^"\\]+|\\.)*+(?:"|\\?\Z)|[\[{\]}]', re.DOTALL)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number out of range: {text[:40]}")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _integer(text: str) -> int:
    if len(text) > 20:
        raise ValueError("integer out of range")
    return int(text)


def _check_depth(text: str) -> None:
    """Refuse deep nesting before a recursive reader meets it."""
    depth = 0
    for token in _TOKEN.finditer(text):
        character = token.group()
        if character in "[{":
            depth += 1
            if depth > _MAX_DEPTH:
                raise ValueError(f"nested deeper than {_MAX_DEPTH} levels")
        elif character in "]}":
            depth -= 1


def parse_json(body: bytes) -> Any:
    """Parse one JSON text; raises `ApiError` 400 saying what is wrong with it."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(400, f"body is not UTF-8: {error}", code="invalid_utf8") from error
    try:
        _check_depth(text)
        value = json.loads(
            text, parse_float=_finite, parse_constant=_no_constant, parse_int=_integer
        )
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ApiError(400, "body holds a lone surrogate", code="invalid_utf8") from error
    except ValueError as error:
        raise ApiError(400, f"body is not JSON: {error}", code="invalid_json") from error
    return value


class StrictRequest(Request):
    """A request whose body is cut off at the limit while it streams in."""

    async def body(self) -> bytes:
        """The whole body; `ApiError` 413 once it passes the caller's limit."""
        if not hasattr(self, "_body"):
            limit: int = self.state.max_body_bytes
            declared = self.headers.get("content-length", "")
            size = int(declared) if declared.isascii() and declared.isdigit() else 0
            chunks: list[bytes] = []
            if size <= limit:
                size = 0
                async for chunk in self.stream():
                    size += len(chunk)
                    if size > limit:
                        break
                    chunks.append(chunk)
            if size > limit:
                # The server reads what is left and forgets it. If it closed the connection instead,
                # many a client that still sends would see that alone.
                raise ApiError(413, f"body is larger than {limit} bytes", code="body_too_large")
            self._body = b"".join(chunks)
        return self._body

    async def json(self) -> Any:
        """The parsed body (see `parse_json`)."""
        return parse_json(await self.body())


class StrictRoute(APIRoute):
    """A route that admits its caller first and whose handler gets a `StrictRequest`."""

    when_away = False  # see `Access.admit`

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, fed with the strict request."""
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            access: Access = request.app.state.gateway.access
            caller = await access.admit(request, self.when_away)
            request.state.max_body_bytes = access.max_body_bytes(caller)
            return await handler(StrictRequest(request.scope, request.receive))

        return strict


class FiguresRoute(StrictRoute):
    """A route that shows figures alone: they are wanted most while the database is away."""

    when_away = True
