"""The FastAPI application: middleware, routes, start and stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

import memshare
from memshare.gateway.access import Access
from memshare.gateway.background import ScoringQueue
from memshare.gateway.errors import install_error_handlers
from memshare.gateway.logs import logger
from memshare.gateway.metrics import Metrics, Sizes
from memshare.gateway.middleware import Admission, Requests
from memshare.gateway.routes import chat, health, memories, retrievers
from memshare.gateway.schemas import ErrorReply
from memshare.gateway.state import Gateway, LLMProbe
from memshare.progress import log
from memshare.retrieval.worker import SearcherClosed
from memshare.sharing import SharedMemory, uses_scorer_llm

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorReply, "description": "not JSON, not UTF-8, or refused by the LLM"},
    401: {"model": ErrorReply, "description": "no valid key"},
    403: {"model": ErrorReply, "description": "no right; or no key, and from another machine"},
    413: {"model": ErrorReply, "description": "the body is too large"},
    422: {"model": ErrorReply, "description": "the body breaks the schema or a limit"},
    429: {"model": ErrorReply, "description": "beyond the key's rate, or the gateway is busy"},
    503: {"model": ErrorReply, "description": "a part isn't ready or can't be reached"},
}


def create_app(
    shared: SharedMemory,
    on_failure: Callable[[BaseException], None] | None = None,
    *,
    on_ready: Callable[[], None] | None = None,
    keys_required: bool = False,
) -> FastAPI:
    """The gateway over ``shared``, which it starts and closes with itself.

    ``keys_required``: nobody is served without a key, the health checks and /openapi.json excepted.
    Starting happens behind /readyz, so that a large encoder's loading looks like that and not like
    a dead process; ``on_failure`` is called if it fails, ``on_ready`` just before the first request
    is served.
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
        Access(shared, metrics, keys_required),
        on_failure=on_failure,
        on_ready=on_ready,
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
    app.add_middleware(Admission, config=config.gateway, metrics=metrics)
    app.add_middleware(Requests, metrics=metrics)  # the last one added is the first one met
    install_error_handlers(app)
    for router in (health.router, health.keyed, chat.router, memories.router, retrievers.router):
        app.include_router(router)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    gateway: Gateway = app.state.gateway
    starting = asyncio.create_task(_start(gateway))
    try:
        yield
    finally:
        gateway.ready = False
        if not starting.done():
            await asyncio.to_thread(gateway.shared.searcher.close)  # ends the wait for it
            await asyncio.wait([starting])
        log("stopping")
        await gateway.queue.stop()
        await gateway.shared.aclose()
        for probe in gateway.probes.values():
            await probe.aclose()
        log("stopped")


async def _start(gateway: Gateway) -> None:
    try:
        await gateway.shared.start()
    except SearcherClosed:  # by `_lifespan`: told to stop before it was ready, which is no failure
        return
    except Exception as error:
        gateway.failure = f"the searcher can't start: {error}"
        logger.error(gateway.failure)
        if gateway.on_failure:
            gateway.on_failure(error)
        return
    gateway.metrics.watch(gateway.shared.searcher.stats, lambda: _sizes(gateway))
    gateway.queue.start()
    if gateway.on_ready:
        gateway.on_ready()
    gateway.ready = True
    log(f"ready: generation {gateway.shared.searcher.stats().generation}")


def _sizes(gateway: Gateway) -> Sizes:
    store = gateway.shared.store
    pools = store.pools()
    return Sizes(
        scoring_queue=gateway.queue.pending(),
        memories={pool.name: store.size(pool.name) for pool in pools},
        held={pool.name: store.held(pool.name) for pool in pools},
        changes={pool.name: pool.last_seq for pool in pools},
    )
