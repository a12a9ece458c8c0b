"""Load on one pool over real HTTP, for benchmarks: searches and writes, and swaps meanwhile.

Everything is kept: each answer with its question, each failure, when each memory could be found.
Times are seconds of `time.monotonic`.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from random import Random
from typing import Any

import aiohttp

from memshare.evaluation.traffic import arrivals
from memshare.records import Hit, SearchAnswer

CLIENTS = 64
WRITE_EVERY = 8  # of so many requests one is a write
K = 5
_TIMEOUT_SECONDS = 60.0
_LOOK_SECONDS = 0.01  # between two looks for a memory that is not found so far
_LOOK_LIMIT = 100  # memories written since that one, at most
_AFTER_SWAP = 0.5  # of a swap's window: the old generation is freed after the first new answer


@dataclass(frozen=True, slots=True)
class Found:
    """A search: its question's number, when it was due and answered, and by what."""

    question: int
    due: float
    done: float
    answer: SearchAnswer


@dataclass
class Load:
    """One pool's clients, spread over the gateways ``urls``.

    With several, each memory is written through one and looked for through the next; with one, a
    memory must be found by the first search after its write was acknowledged.
    """

    urls: Sequence[str]
    pool: str
    questions: Sequence[str]
    texts: Iterator[tuple[str, str]]  # prompts and answers to write, all different
    rng: Random
    found: list[Found] = field(default_factory=list)
    written: list[tuple[str, str, str]] = field(default_factory=list)  # id, prompt, answer
    visible: list[tuple[float, float]] = field(default_factory=list)  # when due, seconds until then
    swaps: list[tuple[float, float]] = field(default_factory=list)  # from request to end
    swap_seconds: list[float] = field(default_factory=list)  # from request to first new answer
    failures: list[str] = field(default_factory=list)

    async def __aenter__(self) -> Load:
        """Open the clients' connections.

        No garbage collection until they are closed: it stops all clients for as long as a slow
        answer takes, and every answer in flight would seem slow.
        """
        gc.disable()
        self._client = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(_TIMEOUT_SECONDS), raise_for_status=True
        )
        self._free = asyncio.Semaphore(CLIENTS)
        self._numbers = itertools.count()
        self._generation: int | None = None
        self._turned = asyncio.Event()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close them."""
        await self._client.close()
        gc.enable()

    async def capacity(self, seconds: float) -> float:
        """Requests a second when every client sends its next one once the last is answered."""
        began = time.monotonic()
        count = 0

        async def client() -> None:
            nonlocal count
            while time.monotonic() - began < seconds:
                await self._one(time.monotonic())
                count += 1

        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        return count / (time.monotonic() - began)

    def forget(self) -> None:
        """Keep nothing of what was so far but the failures."""
        self.found, self.written, self.visible = [], [], []

    async def run(self, rate: float, done: Callable[[], bool]) -> None:
        """Open loop: ``rate`` requests a second, at random moments (Poisson), until ``done``."""
        gaps = (self.rng.expovariate(rate) for _ in itertools.count())
        async with asyncio.TaskGroup() as running:  # what is no failure of a request ends it all
            async for _, due in arrivals(gaps):
                if done():
                    break
                running.create_task(self._one(due))

    async def swap(self, retriever: str, numbers: Sequence[int], every: float) -> None:
        """Activate ``numbers`` in turn, one every so many seconds, until cancelled."""
        for number in itertools.cycle(numbers):
            if number == self._generation:
                continue
            began = time.monotonic()
            path = f"/v1/retrievers/{retriever}/generations/{number}/activate"
            if await self._post(self.urls[0] + path, {}) is not None:
                while self._generation != number:
                    self._turned.clear()
                    await self._turned.wait()
                self.swap_seconds.append(time.monotonic() - began)
                await asyncio.sleep(_AFTER_SWAP)
                self.swaps.append((began, time.monotonic()))
            await asyncio.sleep(max(0.0, began + every - time.monotonic()))

    async def _one(self, due: float) -> None:
        number = next(self._numbers)
        if number % WRITE_EVERY == 0:
            await self._write(due, number // WRITE_EVERY)
        else:
            await self._search(due, self.urls[number % len(self.urls)])

    async def _search(self, due: float, url: str) -> None:
        question = self.rng.randrange(len(self.questions))
        body = {"pool": self.pool, "query": self.questions[question], "k": K}
        reply = await self._post(f"{url}/v1/memories/search", body)
        if reply is None:
            return
        hits = tuple(Hit(memory["id"], memory["similarity"]) for memory in reply["memories"])
        generation = reply["generation"]
        self.found.append(Found(question, due, time.monotonic(), SearchAnswer(generation, hits)))
        if generation != self._generation:
            self._generation = generation
            self._turned.set()

    async def _write(self, due: float, number: int) -> None:
        prompt, answer = next(self.texts)
        since = datetime.now(UTC).isoformat()
        url = self.urls[number % len(self.urls)]
        item = {"pool": self.pool, "prompt": prompt, "answer": answer}
        reply = await self._post(f"{url}/v1/memories", {"items": [item]})
        if reply is None:
            return
        acknowledged = time.monotonic()
        result = reply["results"][0]
        if result["status"] != "stored":
            self.failures.append(f"a write was answered {result}")
            return
        self.written.append((result["id"], prompt, answer))
        other = self.urls[(number + 1) % len(self.urls)]
        while not await self._look(other, result["id"], prompt, since):
            if other == url or time.monotonic() - due > _TIMEOUT_SECONDS:
                self.failures.append(f"{result['id']}: acknowledged, and not found by {other}")
                return
            await asyncio.sleep(_LOOK_SECONDS)
        end = acknowledged if other == url else time.monotonic()
        self.visible.append((due, end - due))

    async def _look(self, url: str, id: str, prompt: str, since: str) -> bool:
        """Whether a search among the memories written ``since`` then finds this one."""
        body = {
            "pool": self.pool, "query": prompt, "k": _LOOK_LIMIT,
            "filter": {"created_after": since},
        }  # fmt: skip
        reply = await self._post(f"{url}/v1/memories/search", body)
        return reply is not None and id in [memory["id"] for memory in reply["memories"]]

    async def _post(self, url: str, body: dict[str, Any]) -> dict[str, Any] | None:
        try:
            # A client sends one request at a time.
            async with self._free, self._client.post(url, json=body) as reply:
                answer: dict[str, Any] = await reply.json()
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            # Counted, shown, and the load goes on: that nothing fails is what a run must prove.
            self.failures.append(f"{url}: {error!r}")
            return None
        return answer
