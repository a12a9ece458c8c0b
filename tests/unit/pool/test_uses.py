"""Use counts: added up over processes and batches, gone with the memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from memshare.pool.errors import PoolError, UnknownPool
from memshare.pool.schema import uses
from memshare.pool.store import PoolStore
from memshare.pool.uses import UseCounter, UseCounts
from memshare.records import NewMemory


@pytest.fixture
def store(url: str) -> Iterator[PoolStore]:
    with PoolStore.open(url) as opened:
        opened.create_pool("main")
        yield opened


def add(store: PoolStore, *prompts: str) -> list[str]:
    return [r.id for r in store.append([NewMemory("main", p, "a") for p in prompts])]


def test_counts_add_up_and_go_with_the_memory(store: PoolStore) -> None:
    a, b, c = add(store, "a", "b", "c")
    counts = UseCounts(store.database)
    counts.add({})
    counts.add({a: 2, "unknown": 5})
    store.delete(c)
    counts.add({a: 1, b: 4, c: 9})
    assert counts.of_pool("main") == {a: 3, b: 4}
    store.delete(b)
    with store.database.read() as connection:
        assert list(connection.scalars(sa.select(uses.c.memory_id))) == [a]
    store.create_pool("other")
    assert counts.of_pool("other") == {}
    with pytest.raises(UnknownPool):
        counts.of_pool("nope")


def test_processes_that_add_side_by_side_lose_nothing(store: PoolStore, url: str) -> None:
    ids = add(store, *(f"prompt {n}" for n in range(20)))

    def work(order: list[str]) -> None:
        with PoolStore(url) as mine:
            for _ in range(10):
                UseCounts(mine.database).add(dict.fromkeys(order, 1))

    threads = [threading.Thread(target=work, args=(ids[::step],)) for step in (1, -1, 1, -1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert UseCounts(store.database).of_pool("main") == dict.fromkeys(ids, 40)


def test_what_could_not_be_added_is_kept(store: PoolStore, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = add(store, "a", "b")
    counts = UseCounts(store.database)
    counter = UseCounter(counts)
    counter.count([a, b, a])

    def away(_: object) -> None:
        counter.count([b])  # meanwhile
        raise PoolError("away")

    with monkeypatch.context() as patch:
        patch.setattr(counts, "add", away)
        with pytest.raises(PoolError):
            counter.flush()
    counter.flush()
    counter.flush()
    assert counts.of_pool("main") == {a: 2, b: 2}
