"""Requests leave by the clock, whatever the loop does."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

import pytest

from memshare.evaluation.traffic import Stream, arrivals
from memshare.pocket.world import World


def test_due_times_stay_where_they_are_when_the_loop_is_late() -> None:
    async def inside() -> list[tuple[int, float, float]]:
        seen = []
        async for number, due in arrivals(itertools.repeat(0.02)):
            if number == 2:
                time.sleep(0.07)  # the loop stands
            seen.append((number, due, time.monotonic()))
            if number == 8:
                return seen
        raise AssertionError

    seen = asyncio.run(inside())
    first = seen[0][1]
    for number, due, at in seen:
        assert abs(due - first - 0.02 * number) < 1e-6
        assert at >= due
    assert seen[4][2] - seen[4][1] > 0.02  # behind, and not put off


def test_a_request_that_ended_in_no_known_way_ends_the_stream() -> None:
    """It would be neither answered nor failed, and the demo says that none failed."""

    class Odd(Stream):
        async def _watch(self) -> None: ...

        async def _look(self) -> None: ...

        async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
            return {} if body["user"] == "agent-0" else {"memshare": {"generation": 1}}

    async def run() -> None:
        stream = Odd("http://127.0.0.1:9", "pool", 100, 1000.0)
        asked: list[int] = []
        await stream.run(World().tasks()[:9], [], lambda: len(asked) == 9, asked.append)

    with pytest.raises(KeyError, match="memshare"):
        asyncio.run(run())
