"""A principal's share of a pool, and copies of one answer: counted right, whoever writes when."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from memshare.pool.limits import Limits
from memshare.pool.schema import authors, copies, pools
from memshare.pool.store import PoolStore
from memshare.records import AppendResult, NewMemory


@pytest.fixture
def store(url: str) -> Iterator[PoolStore]:
    with PoolStore.open(url) as opened:
        opened.create_pool("main")
        yield opened


def write(
    store: PoolStore, agent: str | None, *prompts: str, limits: Limits, **more: str
) -> list[AppendResult]:
    new = [NewMemory("main", prompt, f"of {prompt}", agent=agent, **more) for prompt in prompts]  # type: ignore[arg-type]
    return store.append(new, {"main": limits})


def statuses(results: list[AppendResult]) -> list[str]:
    return [result.status for result in results]


def counted(store: PoolStore) -> tuple[int, dict[str, int]]:
    """The pool's size and counts by author, as kept."""
    with store.database.read() as connection:
        size = connection.execute(sa.select(pools.c.size)).scalar_one()
        rows = connection.execute(sa.select(authors.c.agent, authors.c.count))
        return size, {agent: count for agent, count in rows if count}


def test_a_small_pool_binds_nobody_below_the_floor(store: PoolStore) -> None:
    limits = Limits(principal_share=0.25, principal_floor=3)
    names = [f"q{n}" for n in range(5)]
    results = write(store, "ann", *names, limits=limits)
    assert statuses(results) == ["stored"] * 3 + ["rejected"] * 2
    assert (results[3].id, results[3].seq) == ("", 0)
    assert results[3].reason.startswith("ann wrote 3 of the pool's 3 memories")
    assert store.last_seq("main") == 3
    # Others may write; and as the pool grows, so does her part of it.
    for number in range(4):
        agent = f"agent {number}"
        assert write(store, agent, f"a{number}", f"b{number}", f"c{number}", limits=limits)
    assert statuses(write(store, "ann", "q3", "q4", limits=limits)) == ["stored", "rejected"]
    assert store.stats("main").by_agent["ann"] == 4 == int(0.25 * 16)


def test_nobodys_memories_count_for_the_pool_alone(store: PoolStore) -> None:
    limits = Limits(principal_share=0.5, principal_floor=1)
    assert statuses(write(store, None, *"abcdefgh", limits=limits)) == ["stored"] * 8
    names = [f"q{n}" for n in range(10)]
    assert statuses(write(store, "ann", *names, limits=limits)).count("stored") == 8


def test_deleting_makes_room_and_a_hold_does_not(store: PoolStore) -> None:
    limits = Limits(principal_share=0.1, principal_floor=2)
    first, second = write(store, "ann", "a", "b", limits=limits)
    assert store.hold(first.id)
    assert statuses(write(store, "ann", "c", limits=limits)) == ["rejected"]
    assert store.delete(second.id) and not store.delete(second.id)
    assert statuses(write(store, "ann", "c", limits=limits)) == ["stored"]
    assert store.delete(first.id)  # a held one
    assert counted(store) == (1, {"ann": 1})


def test_a_duplicate_is_none_of_the_share(store: PoolStore) -> None:
    limits = Limits(principal_share=0.1, principal_floor=1)
    (kept,) = write(store, "ann", "a", limits=limits)
    again = write(store, "ann", "a", "A ", limits=limits)
    assert statuses(again) == ["duplicate"] * 2 and again[0].id == kept.id
    assert counted(store) == (1, {"ann": 1})


def test_writers_side_by_side_do_not_slip_past(url: str, store: PoolStore) -> None:
    limits = Limits(principal_share=0.01, principal_floor=10)

    def flood(number: int) -> int:
        with PoolStore(url) as mine:  # as another gateway
            return sum(
                write(mine, "ann", f"{number}/{n}", limits=limits)[0].status == "stored"
                for n in range(8)
            )

    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(flood, range(4))) == 10
    assert counted(store) == (10, {"ann": 10})


def test_an_answer_is_copied_only_so_often(store: PoolStore) -> None:
    limits = Limits(copies=2)
    (origin,) = write(store, "ann", "first", limits=limits)
    one, two, three = write(store, "bob", "1", "2", "3", limits=limits, copy_of=origin.id)
    assert statuses([one, two, three]) == ["stored", "stored", "rejected"]
    assert three.id == origin.id and "which 2 others repeat" in three.reason
    # A copy of a copy is one of the first memory's, whoever makes it.
    (four,) = write(store, "eve", "4", limits=limits, copy_of=two.id)
    assert four.status == "rejected"
    assert store.delete(one.id)
    (four,) = write(store, "eve", "4", limits=limits, copy_of=two.id)
    assert four.status == "stored"
    with store.database.read() as connection:
        assert set(connection.execute(sa.select(copies)).all()) == {
            (two.id, origin.id), (four.id, origin.id)
        }  # fmt: skip


def test_what_is_deleted_or_on_hold_is_not_copied(store: PoolStore) -> None:
    held, gone = write(store, "ann", "a", "b", limits=Limits())
    store.hold(held.id)
    store.delete(gone.id)
    for id in (held.id, gone.id):
        (copy,) = write(store, "bob", "c", limits=Limits(), copy_of=id)
        assert (copy.status, copy.id) == ("rejected", "")
        assert "deleted or put on hold" in copy.reason


def test_a_memory_can_arrive_on_hold(store: PoolStore) -> None:
    (result,) = write(store, "ann", "a", limits=Limits(), hold="it looks odd")
    assert (result.status, result.reason) == ("held", "it looks odd")
    assert list(store.iter("main")) == []
    ((memory,), _) = store.list("main", held=True)
    assert (memory.id, memory.hold_reason) == (result.id, "it looks odd")
    assert store.release(memory.id)
    ((memory,), _) = store.list("main")
    assert memory.hold_reason is None and store.list("main", held=True) == ([], None)


@settings(max_examples=25, deadline=None)
@given(
    share=st.sampled_from([0.1, 0.25, 0.3, 0.5, 1.0]),
    floor=st.integers(1, 4),
    script=st.lists(
        st.tuples(st.sampled_from(["ann", "bob", "eve", None]), st.integers(0, 3)), max_size=40
    ),
)
def test_no_order_of_writes_breaks_the_limit(
    tmp_path_factory: pytest.TempPathFactory,
    share: float,
    floor: int,
    script: list[tuple[str | None, int]],
) -> None:
    folder = tmp_path_factory.mktemp("script")
    limits = Limits(principal_share=share, principal_floor=floor)
    with PoolStore.open(f"sqlite:///{folder}/pool.db") as store:
        store.create_pool("main")
        for step, (agent, count) in enumerate(script):
            write(store, agent, *(f"{step}.{n}" for n in range(count)), limits=limits)
            stats = store.stats("main")
            for name, have in stats.by_agent.items():
                # Nothing is deleted here, so what held at the writing holds from then on.
                assert not name or have <= max(floor, share * stats.memories + 1e-6)
            by_agent = {name: have for name, have in stats.by_agent.items() if name}
            assert counted(store) == (stats.memories, by_agent)
