"""Requests leave by the clock, whatever the loop does."""

from __future__ import annotations

import asyncio
import itertools
import time

from memshare.evaluation.traffic import arrivals


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
