"""Whether the process lives, whether it can serve, and its figures."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from memshare.gateway.access import Caller, need
from memshare.gateway.schemas import ErrorReply
from memshare.gateway.state import AnyGateway
from memshare.gateway.strict import FiguresRoute
from memshare.pool.keys import EVERY_POOL

router = APIRouter(tags=["health"])  # open to all: load balancers have no keys
keyed = APIRouter(route_class=FiguresRoute, tags=["health"])


# `response_class` would be the form of the errors, too.
_PLAIN: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {}}}}


@router.get("/healthz", response_class=Response, responses=_PLAIN)
async def healthz() -> Response:
    """The process is alive and its event loop turns."""
    return PlainTextResponse("ok")


@router.get("/readyz", responses={503: {"description": "not ready yet"}})
async def readyz(gateway: AnyGateway) -> JSONResponse:
    """200 once memories can be searched. The LLMs' state is shown, but doesn't decide.

    Without its LLM the gateway still serves memories, and chat answers 503.
    """
    states = await asyncio.gather(*(probe.state() for probe in gateway.probes.values()))
    body: dict[str, Any] = {
        "ready": gateway.ready,
        "reason": None if gateway.ready else gateway.failure or "starting",
        "generation": gateway.shared.searcher.stats().generation if gateway.ready else None,
        "llm": dict(zip(gateway.probes, states, strict=True)),
    }
    return JSONResponse(body, status_code=200 if gateway.ready else 503)


@keyed.get("/metrics", response_class=Response, responses={**_PLAIN, 403: {"model": ErrorReply}})
async def metrics(gateway: AnyGateway, caller: Caller) -> Response:
    """Prometheus' exposition format. It names every pool: a key needs to read all of them."""
    need(caller, "read", EVERY_POOL, "")
    states = await asyncio.gather(*(probe.state() for probe in gateway.probes.values()))
    for name, state in zip(gateway.probes, states, strict=True):
        gateway.metrics.llm_up.labels(name).set(not state.startswith("unreachable"))
    body = await gateway.shared.read(gateway.metrics.render)
    return Response(body, media_type=CONTENT_TYPE_LATEST)
