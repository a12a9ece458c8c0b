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


def test_a_pool_too_small_for_a_batch_of_an_epoch_has_one_all_the_same() -> None:
    both = [*items([None] * 200), *items([None], "small")]
    order = Order(both, global_batch=4, seed=0, pool_temperature=1.01)
    assert [200] in epoch(order)


def written(made: list[Selected], positives: list[list[str | None]]) -> list[Selected]:
    """The same queries, each with as many positives as there are authors given."""
    return [
        replace(item, positives=tuple(item.positives[0]._replace(principal=who) for who in authors))
        for item, authors in zip(made, positives, strict=True)
    ]


def parts(made: list[Selected], batch: list[int]) -> tuple[Counter[str], Counter[str]]:
    """How many of the queries, and of the positives, each principal has written."""
    queries, positives = Counter[str](), Counter[str]()
    for item in (made[i] for i in batch):
        queries[item.principal or "?"] += 1
        for passage in item.positives:
            positives[passage.principal or "?"] += 1 / len(item.positives)  # type: ignore[assignment]
    return queries, positives


def most(made: list[Selected], batch: list[int]) -> float:
    """The largest part of a batch that one known principal has, in examples."""
    return max(
        n for part in parts(made, batch) for who, n in {"x": 0, **part}.items() if who != "?"
    )


def test_a_busy_principal_is_capped_in_every_batch_as_it_is_formed() -> None:
    who = ["busy"] * 70 + [f"agent {i % 15}" for i in range(30)]
    made = items(list(np.random.default_rng(1).permutation(who)))
    order = Order(made, global_batch=20, seed=0, max_principal_share=0.25)
    seen: set[int] = set()
    for number in range(80):
        batches = epoch(order, number)
        for batch in batches:
            assert most(made, batch) <= 0.25 * len(batch) and len(set(batch)) == len(batch)
            seen |= set(batch)
        assert [len(batch) for batch in batches] == [8] * 5  # 6 others, and 2 are a quarter of 8
    assert len(seen) == 100  # what one epoch leaves out comes in another
    assert order.left_out() == 60


@pytest.mark.parametrize("share", [0.05, 0.2, 0.25, 0.29, 0.5, 0.9])
@pytest.mark.parametrize(("principals", "global_batch"), [(2, 7), (3, 16), (6, 5), (12, 32)])
def test_no_principal_has_more_than_its_share_of_queries_or_of_positives(
    share: float, principals: int, global_batch: int
) -> None:
    rng = np.random.default_rng([principals, global_batch])
    names = [None, *(f"agent {i}" for i in range(principals))]
    weights = np.arange(1, len(names) + 1) ** 2.0
    counts = {"main": 90, "other": 40, "small": 3}

    def draw(count: int) -> list[str | None]:
        return [names[i] for i in rng.choice(len(names), count, p=weights / weights.sum())]

    made = [
        item
        for pool, count in counts.items()
        for item in written(items(draw(count), pool), [draw(1 + i % 3) for i in range(count)])
    ]
    settings = {"global_batch": global_batch, "seed": 0, "max_principal_share": share}
    order, again = (Order(made, **settings) for _ in range(2))  # type: ignore[arg-type]
    for number in range(3):
        batches = epoch(order, number)
        assert batches == epoch(again, number) and all(batches)
        for batch in batches:
            assert most(made, batch) <= max(1, int(share * len(batch) + 1e-9)) + 1e-9
            assert len({made[i].pool for i in batch}) == 1 and len(set(batch)) == len(batch)
    left = sum(counts.values()) - sum(len(batch) for batch in epoch(order))
    assert order.left_out() == left


def test_one_who_writes_what_others_are_taught_is_capped_as_well() -> None:
    made = items([f"agent {i % 12}" for i in range(120)])
    made = written(made, [["eve" if i % 5 < 3 else f"agent {i % 11}"] for i in range(120)])
    order = Order(made, global_batch=20, seed=0, max_principal_share=0.25)
    taught = [parts(made, batch)[1]["eve"] / len(batch) for batch in epoch(order)]
    assert 0.2 < sum(taught) / len(taught) <= max(taught) <= 0.25


def test_what_has_no_room_in_a_batch_waits_for_the_next() -> None:
    """Eight principals are far from their share, but sometimes above it by chance."""
    rng = np.random.default_rng(0)
    made = items([f"agent {i}" for i in rng.integers(8, size=320)])
    made = written(made, [[f"agent {i}"] for i in rng.integers(8, size=320)])
    order = Order(made, global_batch=16, seed=0, max_principal_share=0.25)
    assert order.left_out() <= 0.03 * 320
    assert Order(made, global_batch=16, seed=0).left_out() == 0


def test_unknown_principals_are_not_one() -> None:
    order = Order(items([None] * 40), global_batch=10, seed=0, max_principal_share=0.1)
    assert [len(batch) for batch in epoch(order)] == [10] * 4
    assert order.left_out() == 0


def test_one_principal_alone_is_not_capped() -> None:
    """In its own pool nobody is outweighed; where somebody else has written, batches are small."""
    alone, shared = items(["only"] * 9), items(["only"] * 8 + ["other"], "shared")
    order = Order([*alone, *shared], global_batch=4, seed=0, max_principal_share=0.01)
    firsts = [epoch(order, number) for number in range(4)]
    for batches in firsts:
        sizes = {pool: sorted(len(b) for b in batches if (b[0] < 9) == (pool == "alone"))
                 for pool in ("alone", "shared")}  # fmt: skip
        assert sizes == {"alone": [3, 3, 3], "shared": [1, 1, 2]}
    assert all(left != right for left, right in pairwise(firsts))
    taught = written(
        alone, [["other"], *([None] for _ in range(8))]
    )  # who wrote a positive is there
    order = Order(taught, global_batch=4, seed=0, max_principal_share=0.01)
    assert [len(batch) for batch in epoch(order)] == [1, 1, 1]
