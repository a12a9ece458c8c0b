"""HTTP connections that are each used by one request at a time, without a pool to search.

httpx's pool looks at every connection several times a request and polls its socket, so a request
costs the more the more of them there are.
"""

from __future__ import annotations

import urllib.request
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import cast

import httpx

KEPT = 64  # idle connections to one server
# Then an idle connection isn't used again. Servers close theirs after 5 s (uvicorn's default, and
# vLLM's): a request that meets that moment is lost.
IDLE_SECONDS = 2.0
Origin = tuple[str, str, int | None]  # scheme, host, port


class Lanes(httpx.AsyncBaseTransport):
    """A transport for `httpx.AsyncClient`: as many connections as there are requests under way.

    Of the idle ones the last used is used next. Proxies of the environment (HTTP_PROXY and its
    like) are used as httpx does. Belongs to one event loop.
    """

    def __init__(self) -> None:
        """Connect nothing yet."""
        self._certificates = httpx.create_ssl_context()  # read once: it takes a while
        self._idle: dict[Origin, list[httpx.AsyncHTTPTransport]] = defaultdict(list)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send ``request``; its lane is free again when the response is closed."""
        idle = self._idle[request.url.scheme, request.url.host, request.url.port]
        lane = idle.pop() if idle else self._open(request.url)
        try:
            response = await lane.handle_async_request(request)
        except BaseException:
            await lane.aclose()
            raise
        response.stream = _Body(cast(httpx.AsyncByteStream, response.stream), lane, idle)
        return response

    async def aclose(self) -> None:
        """Close what is idle."""
        for idle in self._idle.values():
            while idle:
                await idle.pop().aclose()

    def _open(self, url: httpx.URL) -> httpx.AsyncHTTPTransport:
        proxies = {} if urllib.request.proxy_bypass(url.host) else urllib.request.getproxies()
        return httpx.AsyncHTTPTransport(
            verify=self._certificates,
            limits=httpx.Limits(max_connections=1, keepalive_expiry=IDLE_SECONDS),
            proxy=proxies.get(url.scheme, proxies.get("all")),
        )


class _Body(httpx.AsyncByteStream):
    """A response's body; once it is closed, its lane is one of the ``idle`` ones."""

    def __init__(
        self,
        inner: httpx.AsyncByteStream,
        lane: httpx.AsyncHTTPTransport,
        idle: list[httpx.AsyncHTTPTransport],
    ) -> None:
        self._inner = inner
        self._lane = lane
        self._idle = idle
        self._closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._inner:
            yield part

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            await self._inner.aclose()  # a body that was not read to its end takes the connection
        except BaseException:
            await self._lane.aclose()
            raise
        if len(self._idle) < KEPT:
            self._idle.append(self._lane)
        else:
            await self._lane.aclose()
