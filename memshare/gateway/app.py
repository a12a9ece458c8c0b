"""The FastAPI application: middleware, routes, start and stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

import memshare
from memshare.gateway.background import ScoringQueue
from memshare.gateway.errors import install_error_handlers
from memshare.gateway.metrics import Metrics, RequestMetrics, Sizes
from memshare.gateway.routes import chat, health, memories, retrievers
from memshare.gateway.schemas import ErrorReply
from memshare.gateway.state import Gateway, LLMProbe
from memshare.progress import log
from memshare.sharing import SharedMemory, uses_scorer_llm

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorReply, "description": "not JSON, not UTF-8, or refused by the LLM"},
    413: {"model": ErrorReply, "description": "the body is too large"},
    422: {"model": ErrorReply, "description": "the body breaks the schema or a limit"},
    503: {"model": ErrorReply, "description": "a part isn't ready or can't be reached"},
}


def create_app(
    shared: SharedMemory, on_failure: Callable[[BaseException], None] | None = None
) -> FastAPI:
    """The gateway over ``shared``, which it starts and closes with itself.

    Starting happens behind /readyz, so that a large encoder's loading looks like that and not like
    a dead process; ``on_failure`` is called if it fails.
    """
    metrics = Metrics()
    shared.observe = metrics.observe
    config = shared.config
    probes = {"agent": LLMProbe(config.agent_llm)}
    if uses_scorer_llm(config):
        probes["scorer"] = LLMProbe(config.scorer_llm)
    gateway = Gateway(
        shared,
        metrics,
        ScoringQueue(shared, metrics),
        probes,
        on_failure=on_failure,
    )
    app = FastAPI(
        title="memshare",
        version=memshare.__version__,
        description="Agents share memories; the retriever learns from them while it serves.",
        lifespan=_lifespan,
        responses=_ERRORS,
        docs_url=None,  # its page loads scripts from elsewhere; /openapi.json is all one needs
        redoc_url=None,
    )
    app.state.gateway = gateway
    app.state.max_body_bytes = config.gateway.max_body_bytes
    app.add_middleware(RequestMetrics, metrics=metrics)
    install_error_handlers(app)
    for router in (health.router, chat.router, memories.router, retrievers.router):
        app.include_router(router)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    gateway: Gateway = app.state.gateway
    gateway.queue.start()
    starting = asyncio.create_task(_start(gateway))
    try:
        yield
    finally:
        gateway.ready = False
        if not starting.done():
            await asyncio.to_thread(gateway.shared.searcher.close)  # ends the wait for it
            await asyncio.wait([starting])
        log(f"stopping: {gateway.queue.pending()} pairs still to decide")
        await gateway.queue.stop()
        await gateway.shared.aclose()
        log("stopped")


async def _start(gateway: Gateway) -> None:
    try:
        await gateway.shared.start()
    except Exception as error:
        gateway.failure = f"the searcher can't start: {error}"
        log(gateway.failure)
        if gateway.on_failure:
            gateway.on_failure(error)
        return
    gateway.metrics.watch(lambda: _sizes(gateway.shared))
    gateway.ready = True
    log(f"ready: generation {gateway.shared.searcher.stats().generation}")


def _sizes(shared: SharedMemory) -> Sizes:
    searcher = shared.searcher.stats()
    stats = [shared.store.stats(info.name) for info in shared.store.pools()]
    return Sizes(
        generation=searcher.generation or 0,
        swaps=max(0, len(searcher.swaps) - 1),  # the first one is the start
        swap_seconds=searcher.swaps[-1].swap_seconds if searcher.swaps else 0.0,
        search_queue=searcher.queue_depth,
        memories={item.pool.name: item.memories for item in stats},
        held={item.pool.name: item.held for item in stats},
    )
