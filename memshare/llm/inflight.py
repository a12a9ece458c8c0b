"""Equal calls that are under way at the same time become one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class InFlight(Generic[T]):
    """One task a key and event loop, whose result (or error) every caller of that key gets."""

    def __init__(self) -> None:
        self._flying: dict[Hashable, asyncio.Task[T]] = {}

    async def share(self, key: Hashable, call: Callable[[], Awaitable[T]]) -> T:
        """The result of ``call``, or of the call under ``key`` that is under way already."""
        task = self._flying.get(key)
        if task is None or task.get_loop() is not asyncio.get_running_loop():
            task = asyncio.create_task(_run(call))
            self._flying[key] = task
            task.add_done_callback(lambda done: self._landed(key, done))
        # Shielded: one caller that gives up must not cancel the others.
        return await asyncio.shield(task)

    def __len__(self) -> int:
        return len(self._flying)

    def _landed(self, key: Hashable, task: asyncio.Task[T]) -> None:
        if self._flying.get(key) is task:
            del self._flying[key]
        if not task.cancelled():
            task.exception()  # marks it as seen where every caller has given up


async def _run(call: Callable[[], Awaitable[T]]) -> T:
    return await call()
