"""Grading and storing behind the answer: workers over the pool's durable queue.

Policy. A finished answer is in the queue before its client has all of it. Whatever the gateway does
then, be killed included, some gateway of this database grades the pair and decides it once
(`pool.queue`). A scorer that can't be asked, a database, or a pool's rubric that can't be read is
tried again until it can. A pair that keeps failing is refused after some attempts: any failure that
is not known counts as one, that the scorer was away only where other pairs were graded meanwhile.
Until its next one such a pair rests, ever longer, and then stands behind those that wait, so that
they have their turn. A stopping gateway works off what was in the queue by then for
``gateway.shutdown_seconds``; what is left stays for the next one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress

from memshare import tracing
from memshare.gateway.logs import logger, where
from memshare.gateway.metrics import Metrics
from memshare.llm.base import LLMUnavailable
from memshare.llm.rubric import RubricError
from memshare.pool.errors import PoolError
from memshare.pool.ids import new_id
from memshare.pool.queue import ClaimLost, Job, PairQueue
from memshare.records import Pair
from memshare.retrieval.worker import SearcherClosed, SearchTimeout
from memshare.sharing import Decision, SharedMemory
from memshare.sharing.turn import FAILED, STORED

_POLL_SECONDS = 1.0  # how soon pairs that another gateway has left behind are seen
_RETRY_SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0)
_MAX_ATTEMPTS = 5


class ScoringQueue:
    """Pairs on their way to the scorer. `start` and `stop` run on the event loop."""

    def __init__(self, shared: SharedMemory, metrics: Metrics) -> None:
        """Nothing runs yet, but pairs are taken."""
        config = shared.config.gateway
        self._shared = shared
        self._metrics = metrics
        self._queue = PairQueue(shared.store.database)
        self._limit = config.scoring_queue
        self._lease = config.scoring_lease_seconds
        self._grace = config.shutdown_seconds
        self._count = config.scoring_workers
        self._jobs: dict[asyncio.Task[None], Job] = {}
        self._loops: list[asyncio.Task[None]] = []
        self._wake = asyncio.Event()
        self._last: str | None = None  # stopping: pairs put after this id are not ours to finish
        self._graded = 0
        # Pairs that were put off: how often, and `_graded` at the last time.
        self._failed: dict[str, tuple[int, int]] = {}
        self._troubles = 0  # in a row: the scorer or the database was away
        self._again_at = 0.0

    async def put(self, pairs: Sequence[Pair]) -> None:
        """Take ``pairs``; each will get its decision, whatever happens, once this returns.

        What can't be stored whatever its grade is decided right here. Raises `PoolError`.
        """
        worth = []
        for pair in pairs:
            if decision := self._shared.writer.hopeless(pair):
                self._tell(pair, await self._shared.settle(pair, decision))
            else:
                worth.append(pair)
        if worth:
            await self._shared.write(self._queue.put, worth)
            self._wake.set()

    def pending(self) -> int:
        """Blocking: pairs without a decision, those of other gateways too."""
        return self._queue.count()

    async def full(self) -> bool:
        """Whether so many pairs wait that no more work should be taken on."""
        return await self._shared.read(self.pending) >= self._limit

    def start(self) -> None:
        """Start to work."""
        self._loops = [asyncio.create_task(self._dispatch()), asyncio.create_task(self._renew())]

    async def join(self) -> None:
        """Wait until the queue is empty."""
        while await self._shared.read(self.pending):
            await asyncio.sleep(0.02)

    async def stop(self) -> None:
        """Finish within the grace what is in the queue; give the rest back."""
        if not self._loops:
            return
        dispatching, renewing = self._loops
        self._last = new_id()
        self._wake.set()
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(dispatching), self._grace)
        self._count = 0  # claims nothing more; a claim under way is given back below
        self._wake.set()
        await dispatching
        renewing.cancel()
        left = dict(self._jobs)
        for task in left:
            task.cancel()
        await asyncio.gather(renewing, *left, return_exceptions=True)
        await self._give_back(list(left.values()))

    async def _dispatch(self) -> None:
        """Claim pairs for idle workers. Ends when stopping and there is nothing to finish."""
        while True:
            self._wake.clear()
            jobs: list[Job] = []
            free = self._count - len(self._jobs)
            if free > 0 and time.monotonic() >= self._again_at:
                try:
                    claim = self._queue.claim
                    jobs = await self._shared.write(claim, free, self._lease, self._last)
                except PoolError as error:
                    self._trouble(error)
            for job in jobs:
                task = asyncio.create_task(self._work(job))
                self._jobs[task] = job
                task.add_done_callback(self._done)
            if self._last and (self._count == 0 or not (jobs or self._jobs)):
                return
            if len(jobs) < free or free <= 0:
                paused = self._again_at - time.monotonic()
                wait = min(paused, _POLL_SECONDS) if paused > 0 else _POLL_SECONDS
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), wait)

    def _done(self, task: asyncio.Task[None]) -> None:
        del self._jobs[task]
        self._wake.set()

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._lease / 3)
            claims = {job.claim for job in self._jobs.values()}
            if claims:
                try:
                    await self._shared.write(self._queue.renew, claims, self._lease)
                except PoolError as error:
                    logger.warning("claims can't be renewed", extra={"failure": where(error)})

    async def _work(self, job: Job) -> None:
        """Decide one pair. Whatever is wrong with it must not stop the others."""
        pair = job.pair
        began = time.monotonic()
        try:
            with tracing.resumed("decide", job.trace):
                if job.attempts <= _MAX_ATTEMPTS:
                    decision = await self._shared.grade_and_store(pair, job)
                else:  # it may be what kills gateways
                    decision = await self._refuse(job)
        except LLMUnavailable as error:
            # Away for all pairs, or for this one: if others were graded since it failed last.
            _, graded = self._failed.get(job.id, (0, self._graded))
            at_fault = self._graded > graded
            if not at_fault:
                self._trouble(error)
            await self._put_off(job, began, at_fault)
        except (SearchTimeout, SearcherClosed):
            logger.warning("stored, but not searchable so far", extra={"pool": pair.pool})
            self._tell(pair, Decision("stored", STORED))
        except ClaimLost:
            logger.warning("another gateway decides a pair of ours", extra={"pool": pair.pool})
        except PoolError as error:  # its lease will end
            self._trouble(error)
        except RubricError as error:  # the pool's trouble, while others are graded
            extra = {"pool": pair.pool, "failure": where(error)}
            logger.warning("a pool's rubric can't be used", extra=extra)
            await self._put_off(job, began, False)
        except Exception as error:  # some pass, a bug stays
            extra = {"pool": pair.pool, "failure": where(error)}
            logger.error("a pair can't be decided", extra=extra)
            await self._put_off(job, began, True)
        else:
            self._troubles = 0
            self._graded += job.attempts <= _MAX_ATTEMPTS
            self._failed.pop(job.id, None)
            self._tell(pair, decision)

    async def _put_off(self, job: Job, began: float, counted: bool) -> None:
        """Let a pair rest that was taken up at ``began`` and failed; ``counted``: by its own fault.

        It rests at least as long as it took, so that pairs that time out leave half of the workers'
        time to the others.
        """
        times, _ = self._failed.pop(job.id, (0, 0))
        self._failed[job.id] = (times + 1, self._graded)
        if len(self._failed) > self._limit:  # other gateways may have decided the oldest ones
            del self._failed[next(iter(self._failed))]
        rest = max(_pause(times), time.monotonic() - began)
        await self._give_back([job], rest, counted)
        asyncio.get_running_loop().call_later(rest, self._wake.set)

    async def _give_back(
        self, jobs: Sequence[Job], pause: float = 0.0, counted: bool = False
    ) -> None:
        with suppress(PoolError):  # then they are free once their lease is over
            await self._shared.write(self._queue.release, jobs, pause, counted)

    async def _refuse(self, job: Job) -> Decision:
        return await self._shared.settle(job.pair, Decision("rejected", FAILED), job)

    def _tell(self, pair: Pair, decision: Decision) -> None:
        self._metrics.decisions.labels(pair.pool, decision.reason).inc()

    def _trouble(self, error: Exception) -> None:
        """The scorer or the database is away, for all pairs alike: pause, and longer each time."""
        pause = _pause(self._troubles)
        self._troubles += 1
        self._again_at = time.monotonic() + pause
        extra = {"failure": where(error), "seconds": pause}
        logger.warning("scoring pauses: scorer or database is away", extra=extra)


def _pause(failures: int) -> float:
    return _RETRY_SECONDS[min(failures, len(_RETRY_SECONDS) - 1)]
