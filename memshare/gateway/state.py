"""What the routes share: the loop's parts, the queue, the metrics, and whether it is all ready."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import aiohttp
from fastapi import Depends, Request

from memshare.config import Config, LLMConfig, without_secrets
from memshare.gateway.access import Access
from memshare.gateway.background import ScoringQueue
from memshare.gateway.errors import ApiError
from memshare.gateway.metrics import Metrics
from memshare.llm.http import LOST, open_session, proxy_of
from memshare.sharing import SharedMemory

_PROBE_SECONDS = 2.0


class LLMProbe:
    """Whether an LLM can be reached, asked at most every few seconds."""

    def __init__(self, config: LLMConfig) -> None:
        """An in-process LLM needs no asking."""
        self._config = config
        self._state = "in process" if config.backend == "transformers" else "unknown"
        self._asked = float("-inf")
        self._lock = asyncio.Lock()
        self._session: aiohttp.ClientSession | None = None

    async def state(self) -> str:
        """``in process``, ``reachable`` or ``unreachable: why``."""
        if self._config.backend == "transformers":
            return self._state
        async with self._lock:
            if time.monotonic() - self._asked > _PROBE_SECONDS:
                states = await asyncio.gather(*map(self._probe, self._config.urls))
                # One replica that answers is enough to answer.
                self._state = next((s for s in states if s == "reachable"), "; ".join(states))
                self._asked = time.monotonic()
        return self._state

    async def _probe(self, url: str) -> str:
        """``reachable`` or ``unreachable: why``; by the way that the LLM's client takes."""
        if self._session is None:
            # One for all time: making one reads every certificate, for which the event loop stands.
            self._session = open_session(self._config.urls, _PROBE_SECONDS, {})
        path = f"{url}/v1/models"
        try:
            async with (
                asyncio.timeout(2 * _PROBE_SECONDS),  # names are looked up, too
                self._session.get(path, proxy=proxy_of(url), allow_redirects=False) as reply,
            ):
                status = reply.status
        except LOST as error:
            return f"unreachable: {without_secrets(path)}: {type(error).__name__}"
        # 401 and 403 come from a server that is up; its key is the backend's affair.
        return "reachable" if status < 500 else f"unreachable: HTTP {status}"

    async def aclose(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()


@dataclass
class Gateway:
    """One gateway's parts. ``failure`` says why the start failed, if it did."""

    shared: SharedMemory
    metrics: Metrics
    queue: ScoringQueue
    probes: dict[str, LLMProbe]
    access: Access
    ready: bool = False
    failure: str | None = None
    on_failure: Callable[[BaseException], None] | None = None
    on_ready: Callable[[], None] | None = None

    @property
    def config(self) -> Config:
        """The whole configuration."""
        return self.shared.config


# Coroutines, though they wait for nothing: FastAPI calls plain functions on a thread each.
async def gateway_of(request: Request) -> Gateway:
    """The gateway that serves this request."""
    state: Gateway = request.app.state.gateway
    return state


async def ready_gateway(request: Request) -> Gateway:
    """The gateway, once it can search; 503 before."""
    state: Gateway = request.app.state.gateway
    if not state.ready:
        raise ApiError(503, state.failure or "the gateway is still starting", code="not_ready")
    return state


AnyGateway = Annotated[Gateway, Depends(gateway_of)]
ReadyGateway = Annotated[Gateway, Depends(ready_gateway)]
