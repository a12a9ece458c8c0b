"""Grading and storing behind the answer: a bounded queue with workers.

Policy. A finished answer waits up to ``gateway.scoring_wait_seconds`` for a place in the queue;
with none by then the answer still goes out, and its pair is dropped with "scoring queue full" on
record. A scorer that can't be reached is tried again until it can or the gateway stops. A stopping
gateway works the queue off for ``gateway.shutdown_seconds``; what is left then is dropped with its
reason on record. So every pair accepted here gets a decision, unless the process is killed.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from memshare.gateway.metrics import Metrics
from memshare.llm.base import LLMUnavailable
from memshare.progress import log
from memshare.sharing import Decision, Pair, SharedMemory

QUEUE_FULL = "scoring queue full"
NO_SCORER = "scorer unavailable"
STOPPED = "gateway stopped"
FAILED = "scoring failed"
_RETRY_SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0)


class ScoringQueue:
    """Pairs on their way to the scorer. `start` and `stop` run on the event loop."""

    def __init__(self, shared: SharedMemory, metrics: Metrics) -> None:
        """Nothing runs yet."""
        config = shared.config.gateway
        self._shared = shared
        self._metrics = metrics
        self._wait = config.scoring_wait_seconds
        self._grace = config.shutdown_seconds
        self._count = config.scoring_workers
        self._queue: asyncio.Queue[Pair] = asyncio.Queue(config.scoring_queue)
        self._workers: list[asyncio.Task[None]] = []
        self._stopping = asyncio.Event()
        self._current: dict[int, Pair] = {}
        metrics.scoring_queue.set_function(self.pending)

    def pending(self) -> int:
        """Pairs without a decision: waiting or being graded."""
        return self._queue.qsize() + len(self._current)

    def start(self) -> None:
        """Start the workers."""
        self._workers = [asyncio.create_task(self._work(place)) for place in range(self._count)]

    def offer(self, pair: Pair) -> bool:
        """Take ``pair`` if there is a place right now."""
        if self._stopping.is_set():
            return False
        try:
            self._queue.put_nowait(pair)
        except asyncio.QueueFull:
            return False
        return True

    async def submit(self, pair: Pair) -> bool:
        """Take ``pair``, waiting a little for a place; False: dropped, and on record as that."""
        if self.offer(pair):
            return True
        if not self._stopping.is_set() and self._wait:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._queue.put(pair), self._wait)
                return True
        await self._drop(pair, STOPPED if self._stopping.is_set() else QUEUE_FULL)
        return False

    async def join(self) -> None:
        """Wait until every pair taken so far has its decision."""
        await self._queue.join()

    async def stop(self) -> None:
        """Work the queue off within the grace; drop the rest, each with its reason on record."""
        self._stopping.set()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._queue.join(), self._grace)
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        left = list(self._current.values())
        while not self._queue.empty():
            left.append(self._queue.get_nowait())
        self._current.clear()
        for pair in left:
            await self._drop(pair, STOPPED)

    async def _work(self, place: int) -> None:
        while True:
            pair = await self._queue.get()
            self._current[place] = pair
            await self._decide(pair)
            del self._current[place]
            self._queue.task_done()

    async def _decide(self, pair: Pair) -> None:
        attempt = 0
        while True:
            try:
                decision = await self._shared.grade_and_store(pair)
            except LLMUnavailable as error:
                if self._stopping.is_set():
                    await self._drop(pair, NO_SCORER)
                    return
                pause = _RETRY_SECONDS[min(attempt, len(_RETRY_SECONDS) - 1)]
                attempt += 1
                log(f"a pair waits for the scorer, again in {pause:g} s: {error}")
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), pause)
            except Exception as error:
                # Whatever is wrong with one pair must not stop the others; it is said, and counted.
                log(f"pool {pair.pool}: a pair can't be decided: {type(error).__name__}: {error}")
                await self._drop(pair, FAILED)
                return
            else:
                self._metrics.decisions.labels(pair.pool, decision.reason).inc()
                return

    async def _drop(self, pair: Pair, reason: str) -> None:
        self._metrics.decisions.labels(pair.pool, reason).inc()
        try:
            await self._shared.record(pair, Decision("rejected", reason))
        except Exception as error:
            log(f"pool {pair.pool}: a drop ({reason}) can't be recorded: {error}")
