"""The client for programs with an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

import httpx

from memshare.client import calls
from memshare.client.base import FAILURES, Connected, Events, broken, read, refusal_of
from memshare.client.calls import Call, Messages, Opinion
from memshare.client.errors import GatewayError
from memshare.client.replies import (
    AddResult,
    ChatChunk,
    ChatReply,
    Found,
    Generations,
    Memory,
    Page,
    Standing,
)

T = TypeVar("T")


class AsyncClient(Connected[httpx.AsyncClient]):
    """A gateway, awaited; the methods are those of `Client`."""

    _connect = httpx.AsyncClient

    async def __aenter__(self) -> AsyncClient:
        """Return itself."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _send(self, call: Call[T]) -> T:
        attempt = 0
        while True:
            try:
                reply = await self._http.request(
                    call.method, call.path, json=call.json, params=call.params
                )
                result = read(call, reply)
            except FAILURES as error:
                result = broken(error)
            if not isinstance(result, GatewayError):
                return result
            await asyncio.sleep(self._pause(result, attempt))
            attempt += 1

    async def chat(
        self,
        messages: Messages,
        *,
        pool: str | None = None,
        shots: int | None = None,
        write: bool | None = None,
        **options: Any,
    ) -> ChatReply:
        """See `Client.chat`."""
        return await self._send(
            calls.chat(messages, options, False, pool=pool, shots=shots, write=write)
        )

    async def stream(
        self,
        messages: Messages,
        *,
        pool: str | None = None,
        shots: int | None = None,
        write: bool | None = None,
        **options: Any,
    ) -> AsyncIterator[ChatChunk]:
        """See `Client.stream`."""
        call = calls.chat(messages, options, True, pool=pool, shots=shots, write=write)
        attempt = 0
        while True:
            try:
                async with self._http.stream(call.method, call.path, json=call.json) as reply:
                    if reply.is_success:
                        events = Events()
                        async for data in reply.aiter_bytes():
                            for chunk in events.read(data):
                                yield chunk
                            if events.done:
                                return
                        for chunk in events.end():
                            yield chunk
                        return
                    await reply.aread()
                    refusal = refusal_of(reply)
            except FAILURES as error:
                refusal = broken(error)
            await asyncio.sleep(self._pause(refusal, attempt))
            attempt += 1

    async def add(
        self,
        pool: str,
        prompt: str,
        answer: str,
        *,
        model: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> AddResult:
        """See `Client.add`."""
        item = {"pool": pool, "prompt": prompt, "answer": answer, "metadata": dict(metadata or {})}
        if model is not None:
            item["model"] = model
        (result,) = await self.add_many([item])
        return result

    async def add_many(
        self, items: Sequence[Mapping[str, Any]], *, import_: bool = False
    ) -> tuple[AddResult, ...]:
        """See `Client.add_many`."""
        return await self._send(calls.add(items, import_))

    async def search(
        self,
        pool: str,
        query: str,
        k: int = 3,
        *,
        agent: str | None = None,
        created_after: str | None = None,
        created_before: str | None = None,
        metadata: Mapping[str, str | int | float | bool] | None = None,
    ) -> Found:
        """See `Client.search`."""
        restrict = {
            "agent": agent, "created_after": created_after, "created_before": created_before,
            "metadata": None if metadata is None else dict(metadata),
        }  # fmt: skip
        return await self._send(calls.search(pool, query, k, restrict))

    async def get(self, id: str) -> Memory:
        """See `Client.get`."""
        return await self._send(calls.get(id))

    async def list(self, pool: str, cursor: str | None = None, limit: int = 100) -> Page:
        """See `Client.list`."""
        return await self._send(calls.page(pool, cursor, limit))

    async def delete(self, id: str) -> None:
        """See `Client.delete`."""
        await self._send(calls.delete(id))

    async def feedback(self, id: str, value: Opinion, comment: str | None = None) -> Standing:
        """See `Client.feedback`."""
        return await self._send(calls.feedback(id, value, comment))

    async def generations(self, retriever: str = "main") -> Generations:
        """See `Client.generations`."""
        return await self._send(calls.generations(retriever))

    async def activate(self, number: int, retriever: str = "main") -> None:
        """See `Client.activate`."""
        await self._send(calls.activate(retriever, number))
