"""Grouping of calls: who travels together, how many at a time, and what errors do."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from memshare.llm.grouping import Grouped


class Ferry:
    """Takes groups of numbers and brings back their squares; records who travelled with whom."""

    def __init__(self, flights: int = 2, most: int = 4, capacity: int = 100) -> None:
        self.groups: list[list[int]] = []
        self.active = self.most_active = 0
        self.grouped = Grouped(
            self.send, flights=flights, most=most, size=lambda item: item, capacity=capacity
        )

    async def send(self, group: Sequence[int]) -> list[int]:
        self.groups.append(list(group))
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        await asyncio.sleep(0.005)
        self.active -= 1
        if 13 in group:
            raise ValueError("thirteen on board")
        return [item**2 for item in group]

    async def all(self, items: Sequence[int]) -> list[int]:
        return await asyncio.gather(*(self.grouped(item) for item in items))


def test_everyone_gets_the_own_result_and_groups_are_bounded() -> None:
    ferry = Ferry(flights=2, most=4)
    items = list(range(11))
    assert asyncio.run(ferry.all(items)) == [item**2 for item in items]
    assert [len(group) for group in ferry.groups] == [4, 4, 3]
    assert ferry.most_active == 2


def test_one_call_does_not_wait_for_company() -> None:
    ferry = Ferry()
    assert asyncio.run(asyncio.wait_for(ferry.grouped(3), 5)) == 9
    assert ferry.groups == [[3]]


def test_a_group_holds_no_more_than_its_capacity_and_a_large_item_goes_alone() -> None:
    ferry = Ferry(most=10, capacity=10)
    assert asyncio.run(ferry.all([4, 5, 6, 50, 1])) == [16, 25, 36, 2500, 1]
    assert ferry.groups == [[4, 5], [6], [50], [1]]


def test_an_error_reaches_its_group_and_nobody_else() -> None:
    ferry = Ferry(most=2)

    async def run() -> list[int | BaseException]:
        calls = (ferry.grouped(item) for item in (1, 13, 3, 4))
        return await asyncio.gather(*calls, return_exceptions=True)

    one, thirteen, three, four = asyncio.run(run())
    assert isinstance(one, ValueError) and isinstance(thirteen, ValueError)
    assert (three, four) == (9, 16)
    assert asyncio.run(ferry.grouped(2)) == 4  # another loop, and no place was lost


def test_who_gives_up_is_left_behind() -> None:
    ferry = Ferry(flights=1, most=1)

    async def run() -> None:
        first = asyncio.create_task(ferry.grouped(1))
        second, third = (asyncio.create_task(ferry.grouped(n)) for n in (2, 3))
        await asyncio.sleep(0.001)
        first.cancel()  # under way: its result finds nobody
        second.cancel()  # waiting: never sent
        assert await third == 9
        for gone in (first, second):
            with pytest.raises(asyncio.CancelledError):
                await gone

    asyncio.run(run())
    assert ferry.groups == [[1], [3]]
