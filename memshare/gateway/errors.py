"""Errors in OpenAI's form: ``{"error": {"message", "type", "param", "code"}}``.

Statuses: 400 what can't be read at all (not JSON, not UTF-8) or what the LLM itself refused, 401 no
valid key, 403 a key without the right or no key and from elsewhere, 404 an unknown pool, memory or
generation, 413 a body that is too large, 422 JSON that breaks the schema or a limit, 429 beyond a
key's rate or more than the gateway can take, 503 a part that isn't ready or can't be reached (both
with Retry-After). 499, for log and metrics alone: the client has gone away.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import HTTPException, RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from memshare.gateway.logs import logger, where
from memshare.gateway.wire import Json
from memshare.llm.base import LLMError, LLMUnavailable
from memshare.pool.errors import InvalidMemory, PoolError, UnknownPool
from memshare.retrieval.searcher import NotServed
from memshare.retrieval.worker import SearcherClosed, SearchTimeout

RETRY_AFTER_SECONDS = 5
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ApiError(HTTPException):
    """A refusal with its status, the parameter it is about, and a machine-readable code."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Statuses 429 and 503 get a Retry-After header of themselves."""
        headers = dict(headers or {})
        if status in (429, 503):
            headers.setdefault("Retry-After", str(RETRY_AFTER_SECONDS))
        super().__init__(status_code=status, detail=message, headers=headers)
        self.param = param
        self.code = code


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The JSON body of one error."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_of(error: Exception) -> ApiError:
    """What an exception of the library means to a client; unknown ones become a 500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, LLMUnavailable):
        return ApiError(503, str(error), code="llm_unavailable")
    if isinstance(error, LLMError):
        return ApiError(400, str(error), code="llm_refused")
    if isinstance(error, NotServed):  # that it is there was seen before
        message = "this pool is stored and listed, but not searched: retriever.pools lacks it"
        return ApiError(404, message, code="pool_not_served")
    if isinstance(error, UnknownPool):
        return ApiError(404, "no such pool", param="pool", code="unknown_pool")
    if isinstance(error, InvalidMemory):
        return ApiError(422, str(error), param=error.field, code="invalid_memory")
    if isinstance(error, PoolError):
        # A database's own message may quote the row that it fails on.
        return ApiError(503, "the pool's database is unavailable", code="pool_unavailable")
    if isinstance(error, SearchTimeout | SearcherClosed):
        return ApiError(503, str(error), code="search_unavailable")
    return ApiError(500, "internal error: see the gateway's log", code="internal_error")


def respond(error: ApiError) -> JSONResponse:
    """The reply that an error becomes."""
    body = error_body(error.status_code, str(error.detail), error.param, error.code)
    return Json(body, status_code=error.status_code, headers=error.headers)


def _describe(problem: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in problem["loc"] if part != "body")
    return f"{where}: {problem['msg']}" if where else str(problem["msg"])


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    if isinstance(error.body, bytes):  # FastAPI parses none that isn't called JSON
        kind = request.headers.get("content-type")
        message = f"the body is not read: it needs Content-Type: application/json, not {kind!r}"
        return respond(ApiError(422, message, code="invalid_request"))
    problems = error.errors()
    message = "; ".join(_describe(problem) for problem in problems[:10])
    loc = [str(part) for part in problems[0]["loc"] if part != "body"] if problems else []
    return respond(ApiError(422, message, param=".".join(loc) or None, code="invalid_request"))


async def _http(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StarletteHTTPException)
    if isinstance(error, ApiError):
        return respond(error)
    headers = dict(error.headers) if error.headers else None
    return respond(ApiError(error.status_code, str(error.detail), headers=headers))


async def _library(_: Request, error: Exception) -> JSONResponse:
    known = error_of(error)
    if known.status_code >= 500:
        logger.error("a request failed", extra={"failure": where(error)})
    return respond(known)


def install_error_handlers(app: FastAPI) -> None:
    """Answer the errors that are known in OpenAI's form; `middleware` answers all others."""
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(StarletteHTTPException, _http)
    for kind in (LLMError, PoolError, InvalidMemory, SearchTimeout, SearcherClosed):
        app.add_exception_handler(kind, _library)
