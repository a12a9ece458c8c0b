"""The client for programs with threads or none."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
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


class Client(Connected[httpx.Client]):
    """A gateway. Thread-safe; every error is a `GatewayError`."""

    _connect = httpx.Client

    def __enter__(self) -> Client:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _send(self, call: Call[T]) -> T:
        attempt = 0
        while True:
            try:
                reply = self._http.request(
                    call.method, call.path, json=call.json, params=call.params
                )
                result = read(call, reply)
            except FAILURES as error:
                result = broken(error)
            if not isinstance(result, GatewayError):
                return result
            time.sleep(self._pause(result, attempt))
            attempt += 1

    def chat(
        self,
        messages: Messages,
        *,
        pool: str | None = None,
        shots: int | None = None,
        write: bool | None = None,
        **options: Any,
    ) -> ChatReply:
        """Answer ``messages`` (or one question) with the most useful memories as examples.

        ``shots`` memories of ``pool`` are shown, and the pair is graded and stored if ``write``;
        None leaves it to the gateway. ``options`` are OpenAI's: temperature, max_tokens, ...
        """
        return self._send(calls.chat(messages, options, False, pool=pool, shots=shots, write=write))

    def stream(
        self,
        messages: Messages,
        *,
        pool: str | None = None,
        shots: int | None = None,
        write: bool | None = None,
        **options: Any,
    ) -> Iterator[ChatChunk]:
        """As `chat`, while the answer grows. A stream that breaks off raises."""
        call = calls.chat(messages, options, True, pool=pool, shots=shots, write=write)
        attempt = 0
        while True:
            try:
                with self._http.stream(call.method, call.path, json=call.json) as reply:
                    if reply.is_success:
                        events = Events()
                        for data in reply.iter_bytes():
                            yield from events.read(data)
                            if events.done:
                                return
                        yield from events.end()
                        return
                    reply.read()
                    refusal = refusal_of(reply)
            except FAILURES as error:
                refusal = broken(error)
            time.sleep(self._pause(refusal, attempt))
            attempt += 1

    def add(
        self,
        pool: str,
        prompt: str,
        answer: str,
        *,
        model: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> AddResult:
        """Store one memory; it can be searched for when this returns (unless ``pending``)."""
        item = {"pool": pool, "prompt": prompt, "answer": answer, "metadata": dict(metadata or {})}
        if model is not None:
            item["model"] = model
        (result,) = self.add_many([item])
        return result

    def add_many(
        self, items: Sequence[Mapping[str, Any]], *, import_: bool = False
    ) -> tuple[AddResult, ...]:
        """Store memories; one result each, in order. ``import_``: with provenance, as an admin."""
        return self._send(calls.add(items, import_))

    def search(
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
        """The ``k`` most useful memories for ``query``, best first; times are ISO 8601."""
        restrict = {
            "agent": agent, "created_after": created_after, "created_before": created_before,
            "metadata": None if metadata is None else dict(metadata),
        }  # fmt: skip
        return self._send(calls.search(pool, query, k, restrict))

    def get(self, id: str) -> Memory:
        """One memory."""
        return self._send(calls.get(id))

    def list(self, pool: str, cursor: str | None = None, limit: int = 100) -> Page:
        """One page of a pool, in the order of storing."""
        return self._send(calls.page(pool, cursor, limit))

    def delete(self, id: str) -> None:
        """Erase one memory for good."""
        self._send(calls.delete(id))

    def feedback(self, id: str, value: Opinion, comment: str | None = None) -> Standing:
        """Say how useful a memory is: from -1 to 1, or ``up`` or ``down``."""
        return self._send(calls.feedback(id, value, comment))

    def generations(self, retriever: str = "main") -> Generations:
        """A retriever's generations, and which one answers."""
        return self._send(calls.generations(retriever))

    def activate(self, number: int, retriever: str = "main") -> None:
        """Roll a retriever back or forward to a generation, and pin it there."""
        self._send(calls.activate(retriever, number))
