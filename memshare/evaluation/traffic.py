"""Agents at work: an open-loop stream of requests to a gateway, with everything counted.

Open loop: requests leave by the clock, whether or not earlier ones are answered, so that a slow
swap shows as waiting and not as a lighter load.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from memshare.pocket.world import Task

_TIMEOUT_SECONDS = 120.0
_WATCH_SECONDS = 0.5
_AFTERWARDS = 0.5  # of the rate, once all problems are out


async def arrivals(gaps: Iterable[float]) -> AsyncIterator[tuple[int, float]]:
    """Number and due time (`time.monotonic`) of each request, by the clock.

    The first is due at once, the others ``gaps`` seconds after the one before. One that comes late,
    since the loop was busy, keeps its due time, and those behind it keep theirs.
    """
    due = time.monotonic()
    for number, gap in enumerate(gaps):
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        yield number, due
        due += gap


@dataclass
class Traffic:
    """What happened: counts, answer times in seconds, and the generations that answered.

    ``swaps``: generation number -> seconds in which no search ran while it was swapped in.
    """

    answered: int = 0
    failed: int = 0
    seconds: list[float] = field(default_factory=list)
    generations: Counter[int] = field(default_factory=Counter)
    swaps: dict[int, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """The report's form of it."""
        ordered = sorted(self.seconds)
        return {
            "answered": self.answered,
            "failed": self.failed,
            "failures": self.failures[:10],
            "seconds_p50": ordered[len(ordered) // 2] if ordered else None,
            "seconds_p99": ordered[int(len(ordered) * 0.99)] if ordered else None,
            "answers_by_generation": {str(k): v for k, v in sorted(self.generations.items())},
        }


class Stream:
    """Sends the world's problems in their order, then test questions until ``done`` says so.

    Problems are written to the pool; a taught one arrives as a finished memory. Test questions only
    keep some load up, half as many a second; they are never written.
    """

    def __init__(self, url: str, pool: str, agents: int, rate: float) -> None:
        """``rate``: requests a second, over all ``agents``."""
        self.traffic = Traffic()
        self._client = httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_SECONDS)
        self._pool = pool
        self._agents = agents
        self._rate = rate

    async def run(
        self,
        problems: Sequence[Task],
        tests: Sequence[Task],
        done: Callable[[], bool],
        asked: Callable[[int], None],
    ) -> Traffic:
        """Returns once ``done()``; ``asked`` is told how many problems are out."""
        running: set[asyncio.Task[None]] = set()
        watcher = asyncio.create_task(self._watch())
        try:
            async for number, _ in arrivals(self._gaps(len(problems))):
                ended = {task for task in running if task.done()}
                for task in ended:
                    task.result()  # raises what is no failure of a request
                running -= ended
                if number < len(problems):
                    work = self._problem(problems[number], number)
                    asked(number + 1)
                elif await asyncio.to_thread(done):
                    break
                else:
                    work = self._ask(tests[number % len(tests)], number, write=False)
                running.add(asyncio.create_task(work))
            await asyncio.gather(*running)
            await self._look()
        finally:
            watcher.cancel()
            await self._client.aclose()
        return self.traffic

    async def _watch(self) -> None:
        while True:
            await self._look()
            await asyncio.sleep(_WATCH_SECONDS)

    async def _look(self) -> None:
        page = (await self._client.get("/metrics")).raise_for_status().text
        seen = {
            family.name: family.samples[0].value
            for family in text_string_to_metric_families(page)
            if family.name in ("memshare_generation", "memshare_swaps", "memshare_swap_seconds")
        }
        if seen["memshare_swaps"]:
            number = int(seen["memshare_generation"])
            self.traffic.swaps.setdefault(number, seen["memshare_swap_seconds"])

    def _gaps(self, problems: int) -> Iterator[float]:
        for number in itertools.count():
            yield 1.0 / (self._rate * (1.0 if number < problems else _AFTERWARDS))

    async def _problem(self, task: Task, number: int) -> None:
        if not task.taught:
            return await self._ask(task, number, write=True)
        item = {"pool": self._pool, "prompt": task.prompt, "answer": task.answer}
        reply = await self._post("/v1/memories", {"items": [item]})
        if reply is not None:
            self.traffic.answered += 1

    async def _ask(self, task: Task, number: int, *, write: bool) -> None:
        body = {
            "messages": [{"role": "user", "content": task.prompt}],
            "memory": {"pool": self._pool, "write": write},
            "user": f"agent-{number % self._agents}",
        }
        reply = await self._post("/v1/chat/completions", body)
        if reply is not None:
            self.traffic.answered += 1
            self.traffic.generations[reply["memshare"]["generation"]] += 1

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        started = time.monotonic()
        try:
            reply = await self._client.post(path, json=body)
            reply.raise_for_status()
            answer: dict[str, Any] = reply.json()
        except (httpx.HTTPError, ValueError) as error:
            # Counted, shown, and the stream goes on: that nothing fails is what a run must prove.
            self.traffic.failed += 1
            self.traffic.failures.append(f"{path}: {error!r}")
            return None
        self.traffic.seconds.append(time.monotonic() - started)
        return answer
