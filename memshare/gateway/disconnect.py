"""Work that is given up when the client for whom it is done has gone away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from fastapi import Request

from memshare.gateway.errors import ApiError

T = TypeVar("T")


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """What ``work`` gives; it is cancelled where the client of ``request`` disconnects first.

    Raises `ApiError` 499 then, as nginx calls it: nobody reads that, but log and metrics have it.
    The body of ``request`` must have been read: what else comes is thrown away. As in vLLM's own
    server, one task works and another one waits for the disconnect; `Request.is_disconnected` only
    tells whether it has come already.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        await leaving
        raise ApiError(499, "the client has gone away", code="client_gone")
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
