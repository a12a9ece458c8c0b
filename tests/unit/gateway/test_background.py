"""The scoring queue: every pair it takes gets one decision, now or in the next gateway."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from memshare.gateway import background
from memshare.gateway.background import ScoringQueue
from memshare.gateway.metrics import Metrics
from memshare.llm.base import LLMUnavailable
from memshare.llm.scorer import Scorer
from memshare.records import Grade, Pair
from memshare.sharing import SharedMemory, open_shared
from tests.loop import loop_config

Body = Callable[[SharedMemory, ScoringQueue], Coroutine[Any, Any, None]]


class Gate(Scorer):
    """Grades 90 once it is opened; away for the first ``absences`` calls. No LLM can be held up."""

    def __init__(self, absences: int = 0) -> None:
        self.open = asyncio.Event()
        self.absences = absences
        self.graded: list[str] = []

    async def _grade(self, prompt: str, answer: str, rubric_text: str) -> Grade:
        if self.absences:
            self.absences -= 1
            raise LLMUnavailable("the scorer is away")
        await self.open.wait()
        if answer == "broken":
            raise ValueError("a fault in a scorer")
        if answer == "slow poison":
            await asyncio.sleep(1.2)
        if answer.endswith("poison"):
            raise LLMUnavailable("the scorer gives HTTP 500 for this one")
        self.graded.append(prompt)
        return Grade(90.0)


@pytest.fixture
def run(tmp_path: Path, models: Path) -> Callable[..., None]:
    def runner(body: Body, absences: int = 0, **gateway: Any) -> None:
        async def inside() -> None:
            config = loop_config(tmp_path / "run", models, gateway=gateway)
            async with open_shared(config) as shared:
                shared.scorer = Gate(absences)
                queue = ScoringQueue(shared, Metrics())
                await body(shared, queue)

        asyncio.run(inside())

    return runner


def pair(number: int, answer: str = "yes") -> Pair:
    return Pair("keep", f"question {number}", answer)


def pairs(count: int) -> list[Pair]:
    return [pair(number) for number in range(count)]


def gate(shared: SharedMemory) -> Gate:
    assert isinstance(shared.scorer, Gate)
    return shared.scorer


async def all_in_work(queue: ScoringQueue, count: int) -> None:
    while len(queue._jobs) < count:
        await asyncio.sleep(0.01)


def test_pairs_are_decided_behind_the_answer(run: Callable[..., None]) -> None:
    async def body(shared: SharedMemory, queue: ScoringQueue) -> None:
        queue.start()
        for number in range(20):
            await queue.put([pair(number)])
        assert queue.pending() == 20
        gate(shared).open.set()
        await queue.join()
        assert shared.store.decisions("keep") == {"stored": 20}
        assert sorted(gate(shared).graded) == sorted(p.prompt for p in pairs(20))
        await queue.stop()

    run(body)


def test_what_can_not_be_stored_is_decided_without_the_queue(run: Callable[..., None]) -> None:
    async def body(shared: SharedMemory, queue: ScoringQueue) -> None:
        await queue.put(
            [pair(1, " "), pair(2, "a\x00b"), Pair("keep", "q", "a", "length"), pair(3)]
        )
        assert queue.pending() == 1
        assert shared.store.decisions("keep") == {"cut off by length": 1, "empty": 1, "invalid": 1}

    run(body)


def test_full_says_so_across_gateways(run: Callable[..., None]) -> None:
    async def body(shared: SharedMemory, queue: ScoringQueue) -> None:
        other = ScoringQueue(shared, Metrics())
        await queue.put(pairs(2))
        assert not await queue.full() and not await other.full()
        await other.put([pair(3)])
        assert await queue.full() and await other.full()

    run(body, scoring_queue=3)


def test_absent_scorer_is_waited_for(run: Callable[..., None]) -> None:
    async def body(shared: SharedMemory, queue: ScoringQueue) -> None:
        gate(shared).open.set()
        queue.start()
        await queue.put([pair(1)])
        await queue.join()
        assert shared.store.decisions("keep") == {"stored": 1}
        await queue.stop()

    run(body, absences=1)


def test_a_stop_does_not_wait_for_an_absent_scorer(run: Callable[..., None]) -> None:
    async def body(shared: SharedMemory, queue: ScoringQueue) -> None:
        queue.start()
        await queue.put([pair(1)])
        while gate(shared).absences == 10**6:
            await asyncio.sleep(0.01)
        await asyncio.wait_for(queue.stop(), 5)
        assert shared.store.decisions("keep") == {}
        await queue.put([pair(2)])  # an answer that came late
        await decided_by_the_next(shared, {"stored": 2})

    run(body, absences=10**6)


async def decided_by_the_next(shared: SharedMemory, decisions: dict[str, int]) -> None:
    """Another gateway's queue takes over at once what was left."""
    gate(shared).absences = 0
    gate(shared).open.set()
    queue = ScoringQueue(shared, Metrics())
    queue.start()
    await asyncio.wait_for(queue.join(), 5)
    await queue.stop()
    assert shared.store.decisions("keep") == decisions


def test_what_the_grace_is_too_short_for_stays_for_the_next(run: Callable[..., None]) -> None:
    async def body(shared: SharedMemory, queue: ScoringQueue) -> None:
        queue.start()
        await queue.put(pairs(3))
        await all_in_work(queue, 2)
        await asyncio.wait_for(queue.stop(), 5)
        assert shared.store.decisions("keep") == {}
        await decided_by_the_next(shared, {"stored": 3})

    run(body, scoring_workers=2, shutdown_seconds=0.2)


def test_a_stop_finishes_what_was_taken(run: Callable[..., None]) -> None:
    async def body(shared: SharedMemory, queue: ScoringQueue) -> None:
        queue.start()
        await queue.put(pairs(10))
        asyncio.get_running_loop().call_later(0.2, gate(shared).open.set)
        await queue.stop()
        assert shared.store.decisions("keep") == {"stored": 10}

    run(body, scoring_workers=2)


def test_a_slow_scorer_keeps_its_claim(run: Callable[..., None]) -> None:
    async def body(shared: SharedMemory, queue: ScoringQueue) -> None:
        other = ScoringQueue(shared, Metrics())
        queue.start()
        await queue.put([pair(1)])
        await all_in_work(queue, 1)
        other.start()
        await asyncio.sleep(1.5)  # five leases, and the other one looks every second
        gate(shared).open.set()
        await queue.join()
        await asyncio.gather(queue.stop(), other.stop())
        assert gate(shared).graded == ["question 1"]

    run(body, scoring_lease_seconds=0.3)


def test_one_broken_pair_does_not_stop_the_others(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "_RETRY_SECONDS", (0.05,))

    async def body(shared: SharedMemory, queue: ScoringQueue) -> None:
        gate(shared).open.set()
        queue.start()
        await queue.put([pair(1, "broken"), pair(2)])
        await asyncio.wait_for(queue.join(), 20)
        await queue.stop()
        assert shared.store.decisions("keep") == {"scoring failed": 1, "stored": 1}

    run(body, scoring_workers=1)


def test_a_pair_that_may_kill_gateways_is_refused_in_the_end(run: Callable[..., None]) -> None:
    async def body(shared: SharedMemory, queue: ScoringQueue) -> None:
        await queue.put([pair(1)])
        for _ in range(5):  # five gateways took it and were never heard of again
            assert queue._queue.claim(1, 0)
        queue.start()
        await queue.stop()
        assert shared.store.decisions("keep") == {"scoring failed": 1}
        assert gate(shared).graded == []

    run(body)


def test_pairs_that_the_scorer_fails_for_hold_nobody_up_and_are_refused(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "_RETRY_SECONDS", (0.05, 0.1))

    async def body(shared: SharedMemory, queue: ScoringQueue) -> None:
        gate(shared).open.set()
        queue.start()
        await queue.put([pair(1, "poison"), pair(2, "poison")])
        newer = 0
        while shared.store.decisions("keep").get("scoring failed", 0) < 2:
            newer += 1  # there is always a newer one
            await queue.put([pair(2 + newer)])
            await asyncio.sleep(0.1)
            assert newer < 300
        await asyncio.wait_for(queue.join(), 20)
        assert shared.store.decisions("keep") == {"stored": newer, "scoring failed": 2}
        assert queue._failed == {}
        await queue.stop()

    run(body, scoring_workers=2)


def test_slow_failures_in_every_worker_leave_the_others_their_turn(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each pause of all scoring is longer than the one before, and than the rests of the first ones.
    monkeypatch.setattr(background, "_RETRY_SECONDS", (0.1, 0.4, 1.6))

    async def body(shared: SharedMemory, queue: ScoringQueue) -> None:
        gate(shared).open.set()
        queue.start()
        await queue.put([pair(number, "slow poison") for number in range(4)])
        await queue.put([pair(number) for number in range(4, 9)])
        async with asyncio.timeout(20):
            while shared.store.decisions("keep").get("stored") != 5:
                await asyncio.sleep(0.05)
        await queue.stop()

    # A failure takes more than ten leases.
    run(body, scoring_workers=2, scoring_lease_seconds=0.1, shutdown_seconds=0.1)


def test_an_outage_for_all_counts_against_no_pair(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "_RETRY_SECONDS", (0.01,))

    async def body(shared: SharedMemory, queue: ScoringQueue) -> None:
        gate(shared).open.set()
        queue.start()
        await queue.put(pairs(3))
        await asyncio.wait_for(queue.join(), 20)
        gate(shared).absences = 40  # far more than the attempts of three pairs
        await queue.put([pair(number) for number in range(3, 6)])
        await asyncio.wait_for(queue.join(), 20)
        assert gate(shared).absences == 0
        assert shared.store.decisions("keep") == {"stored": 6}
        await queue.stop()

    run(body, scoring_workers=2)
