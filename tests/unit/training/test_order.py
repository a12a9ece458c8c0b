"""The order of the data: coverage, shares of pools, and the cap on principals."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from memshare.config import TrainingConfig
from memshare.training.order import Order
from memshare.training.select import Selected, select
from tests.training_data import examples


def items(principals: list[str | None], pool: str = "main") -> list[Selected]:
    made = select(examples(len(principals), pool=pool), TrainingConfig()).items
    return [replace(item, principal=who) for item, who in zip(made, principals, strict=True)]


def epoch(order: Order, number: int = 0) -> list[list[int]]:
    steps = order.steps_per_epoch
    return [order.step(number * steps + i).tolist() for i in range(steps)]


def test_every_item_once_an_epoch_in_batches_of_one_pool() -> None:
    both = [*items([None] * 21), *items([None] * 10, "other")]
    order = Order(both, global_batch=8, seed=3)
    for number in range(2):
        batches = epoch(order, number)
        assert sorted(i for batch in batches for i in batch) == list(range(31))
        assert all(len({both[i].pool for i in batch}) == 1 for batch in batches)
        assert sorted(map(len, batches)) == [5, 5, 7, 7, 7]
    assert epoch(order) != epoch(order, 1)
    assert epoch(order) == epoch(Order(both, global_batch=8, seed=3))


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, (16, 1)), (2.0, (14, 3))])
def test_a_temperature_lifts_small_pools(temperature: float, expected: tuple[int, int]) -> None:
    both = [*items([None] * 128), *items([None] * 8, "small")]
    order = Order(both, global_batch=8, seed=0, pool_temperature=temperature)
    batches = epoch(order)
    shares = Counter(both[batch[0]].pool for batch in batches)
    assert (shares["main"], shares["small"]) == expected
    # 14 to 3 is sqrt(128) to sqrt(8) of 17 batches
    assert all(len(set(batch)) == len(batch) == 8 for batch in batches)
    main = [i for batch in batches for i in batch if both[i].pool == "main"]
    assert len(set(main)) == len(main)  # sampled without replacement, others the next epoch
    later = {i for number in range(6) for batch in epoch(order, number) for i in batch}
    assert len(later) == 136


def test_a_busy_principal_is_capped_in_every_batch() -> None:
    who = ["busy"] * 70 + [f"agent {i % 15}" for i in range(30)]
    made = items(list(np.random.default_rng(1).permutation(who)))
    order = Order(made, global_batch=20, seed=0, max_principal_share=0.25)
    seen: set[int] = set()
    for number in range(20):
        for batch in epoch(order, number):
            counts = Counter(made[i].principal for i in batch)
            assert max(counts.values()) <= 5 and len(set(batch)) == len(batch)
            seen |= set(batch)
    assert len(seen) == 100  # what one epoch leaves out comes in another
    sizes = [len(batch) for batch in epoch(order)]
    assert sum(sizes) == 5 * 5 + 30 and max(sizes) - min(sizes) <= 1


def test_unknown_principals_are_not_one() -> None:
    order = Order(items([None] * 40), global_batch=10, seed=0, max_principal_share=0.1)
    assert [len(batch) for batch in epoch(order)] == [10] * 4


def test_one_principal_alone_still_trains() -> None:
    order = Order(items(["only"] * 9), global_batch=4, seed=0, max_principal_share=0.01)
    assert [len(batch) for batch in epoch(order)] == [1, 1, 1]
    firsts = [tuple(map(tuple, epoch(order, n))) for n in range(4)]
    assert all(left != right for left, right in pairwise(firsts))
