"""The scoring queue: every pair it takes gets a decision, and what it can't take is on record."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from memshare.gateway.background import ScoringQueue
from memshare.gateway.metrics import Metrics
from memshare.llm.base import LLMUnavailable
from memshare.llm.scorer import Scorer
from memshare.records import Grade
from memshare.sharing import Pair, SharedMemory, open_shared
from tests.loop import loop_config

Body = Callable[[SharedMemory, ScoringQueue], Coroutine[Any, Any, None]]


class Gate(Scorer):
    """Grades 90 once it is opened; away for the first ``absences`` calls. No LLM can be held up."""

    def __init__(self, absences: int = 0) -> None:
        self.open = asyncio.Event()
        self.absences = absences

    async def _grade(self, prompt: str, answer: str, rubric_text: str) -> Grade:
        if self.absences:
            self.absences -= 1
            raise LLMUnavailable("the scorer is away")
        await self.open.wait()
        if answer == "broken":
            raise ValueError("a fault in a scorer")
        return Grade(90.0)


@pytest.fixture
def run(tmp_path: Path, models: Path) -> Callable[..., None]:
    def runner(body: Body, absences: int = 0, **gateway: Any) -> None:
        async def inside() -> None:
            config = loop_config(tmp_path / "run", models, gateway=gateway)
            async with open_shared(config) as shared:
                shared.scorer = Gate(absences)
                queue = ScoringQueue(shared, Metrics())
                queue.start()
                await body(shared, queue)

        asyncio.run(inside())

    return runner


def pair(number: int, answer: str = "yes") -> Pair:
    return Pair("keep", f"question {number}", answer)


def opened(shared: SharedMemory) -> None:
    assert isinstance(shared.scorer, Gate)
    shared.scorer.open.set()


def test_pairs_are_decided_behind_the_answer(run: Callable[..., None]) -> None:
    async def body(shared: SharedMemory, queue: ScoringQueue) -> None:
        for number in range(20):
            assert await queue.submit(pair(number))
        assert queue.pending() == 20
        opened(shared)
        await queue.join()
        assert queue.pending() == 0
        assert shared.store.decisions("keep") == {"stored": 20}
        await queue.stop()

    run(body)


def test_full_queue_drops_with_the_reason_on_record(run: Callable[..., None]) -> None:
    async def body(shared: SharedMemory, queue: ScoringQueue) -> None:
        taken = [await queue.submit(pair(number)) for number in range(5)]
        assert taken == [True, True, True, False, False]  # one in work, two waiting
        assert not queue.offer(pair(9))  # the caller says so itself: nothing on record
        assert shared.store.decisions("keep") == {"scoring queue full": 2}
        opened(shared)
        await queue.stop()
        assert shared.store.decisions("keep") == {"stored": 3, "scoring queue full": 2}

    async def settled(shared: SharedMemory, queue: ScoringQueue) -> None:
        await asyncio.sleep(0)  # the worker is at its queue before the first pair comes
        await body(shared, queue)

    run(settled, scoring_workers=1, scoring_queue=2, scoring_wait_seconds=0.1)


def test_a_place_that_frees_in_time_is_taken(run: Callable[..., None]) -> None:
    async def body(shared: SharedMemory, queue: ScoringQueue) -> None:
        for number in range(2):
            await queue.submit(pair(number))
        asyncio.get_running_loop().call_later(0.2, opened, shared)
        assert await queue.submit(pair(2))
        await queue.stop()
        assert shared.store.decisions("keep") == {"stored": 3}

    run(body, scoring_workers=1, scoring_queue=1, scoring_wait_seconds=20)


def test_absent_scorer_is_waited_for(run: Callable[..., None]) -> None:
    async def body(shared: SharedMemory, queue: ScoringQueue) -> None:
        opened(shared)
        await queue.submit(pair(1))
        await queue.join()
        assert shared.store.decisions("keep") == {"stored": 1}
        await queue.stop()

    run(body, absences=1)


def test_a_stop_does_not_wait_for_an_absent_scorer(run: Callable[..., None]) -> None:
    async def body(shared: SharedMemory, queue: ScoringQueue) -> None:
        await queue.submit(pair(1))
        await asyncio.sleep(0.2)
        await queue.stop()
        assert shared.store.decisions("keep") == {"scorer unavailable": 1}
        assert not await queue.submit(pair(2))
        decided = {"scorer unavailable": 1, "gateway stopped": 1}
        assert shared.store.decisions("keep") == decided

    run(body, absences=10**6)


def test_what_the_grace_is_too_short_for_is_on_record(run: Callable[..., None]) -> None:
    async def body(shared: SharedMemory, queue: ScoringQueue) -> None:
        for number in range(3):
            await queue.submit(pair(number))
        await queue.stop()
        assert shared.store.decisions("keep") == {"gateway stopped": 3}

    run(body, scoring_workers=1, shutdown_seconds=0.2)


def test_one_broken_pair_does_not_stop_the_others(run: Callable[..., None]) -> None:
    async def body(shared: SharedMemory, queue: ScoringQueue) -> None:
        opened(shared)
        await queue.submit(pair(1, "broken"))
        await queue.submit(pair(2))
        await queue.stop()
        assert shared.store.decisions("keep") == {"scoring failed": 1, "stored": 1}

    run(body, scoring_workers=1)
