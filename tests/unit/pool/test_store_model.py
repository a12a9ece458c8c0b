"""Random interleavings of two processes' writes, and of readers of the change log, against a model.

Two stores share one database, as two gateways do. A crash is a store that is left as it stands, in
the middle of a transaction. Followers read the change log page by page, as a searcher or a trainer
does, each at its own pace.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from memshare.pool.append import append_to_pool
from memshare.pool.rows import need_pool
from memshare.pool.store import PoolStore
from memshare.pool.validate import check_memory
from memshare.records import Change, NewMemory, content_key
from tests.conftest import DATABASES, database_url

PROMPTS = ["Cat", "cat ", "CAT", "dog", "Straße", "STRASSE", "é", "e\u0301", "雨", "dog  dog"]
ANSWERS = ["yes", "no"]
contents = st.tuples(st.sampled_from(PROMPTS), st.sampled_from(ANSWERS))
who = st.integers(0, 1)


class Pools(RuleBasedStateMachine):
    """``alive``: id to row, in seq order; ``given``: every id ever; ``log``: every change."""

    url: str
    numbers = count()

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[str, dict[str, Any]] = {}
        self.given: list[str] = []
        self.log: list[Change] = []
        self.stores = [PoolStore(self.url), PoolStore(self.url)]
        self.seen = [0, 0]
        self.searchable: list[set[str]] = [set(), set()]

    @initialize()
    def create(self) -> None:
        self.pool = f"pool {next(Pools.numbers)}"
        self.stores[0].create_pool(self.pool)

    def change(self, kind: Any, id: str) -> None:
        self.log.append(Change(self.pool, len(self.log) + 1, kind, id))

    @rule(by=who, new=st.lists(contents, max_size=5))
    def append(self, by: int, new: list[tuple[str, str]]) -> None:
        results = self.stores[by].append([NewMemory(self.pool, p, a) for p, a in new])
        for (prompt, answer), result in zip(new, results, strict=True):
            key = content_key(self.pool, prompt, answer)
            there = [(id, row["seq"]) for id, row in self.alive.items() if row["key"] == key]
            if there:
                assert (result.status, result.id, result.seq) == ("duplicate", *there[0])
                continue
            assert result.status == "stored" and result.id not in self.given
            self.change("add", result.id)
            assert result.seq == len(self.log)
            self.alive[result.id] = {
                "key": key, "prompt": prompt, "answer": answer, "seq": result.seq, "held": False
            }  # fmt: skip
            self.given.append(result.id)

    @rule(by=who, kind=st.sampled_from(["delete", "hold", "release"]), place=st.integers(0, 7))
    def alter(self, by: int, kind: str, place: int) -> None:
        id = self.given[place] if place < len(self.given) else "unknown"
        row = self.alive.get(id)
        possible = row is not None and (kind == "delete" or row["held"] == (kind == "release"))
        assert getattr(self.stores[by], kind)(id) == possible
        if possible:
            assert row is not None
            self.change(kind, id)
            if kind == "delete":
                del self.alive[id]
            else:
                row["held"] = kind == "hold"

    @rule(by=who, new=contents)
    def crash(self, by: int, new: tuple[str, str]) -> None:
        """A process ends within its transaction: all of it is undone."""
        store = self.stores[by]
        connection = store._db.engine.connect().execution_options(memshare_write=True)
        transaction = connection.begin()
        need_pool(connection, self.pool, lock=True)
        append_to_pool(connection, self.pool, [check_memory(NewMemory(self.pool, *new))])
        assert transaction.is_active
        connection.connection.dbapi_connection.close()  # type: ignore[union-attr]
        connection.invalidate()
        store.close()
        self.stores[by] = PoolStore(self.url)

    @rule(by=who, limit=st.integers(1, 4))
    def follow(self, by: int, limit: int) -> None:
        """Take in a page of changes as the searcher does: what to do now, not what was done."""
        store, since = self.stores[by], self.seen[by]
        page = store.changes(self.pool, since, limit)
        assert page == self.log[since : since + limit]
        living = store.get_many([change.id for change in page])
        for change in page:
            memory = living.get(change.id)
            if memory is not None and not memory.held:
                self.searchable[by].add(change.id)
            else:
                self.searchable[by].discard(change.id)
        self.seen[by] += len(page)

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for by, store in enumerate(self.stores):
            while self.seen[by] < len(self.log):
                self.follow(by, 3)
            self.check(store)
            store.close()
            assert self.searchable[by] == {
                id for id, row in self.alive.items() if not row["held"]
            }, "a follower is wrong about what is searchable"

    def check(self, store: PoolStore) -> None:
        assert store.changes(self.pool, 0) == self.log
        assert store.last_seq(self.pool) == len(self.log)
        every = list(store.iter(self.pool, include_held=True))
        assert [(m.id, m.prompt, m.answer, m.seq, m.held) for m in every] == [
            (id, row["prompt"], row["answer"], row["seq"], row["held"])
            for id, row in self.alive.items()
        ]
        assert [m.id for m in store.iter(self.pool)] == [m.id for m in every if not m.held]
        assert set(store.get_many(self.given)) == set(self.alive)
        stats = store.stats(self.pool)
        assert (stats.memories, stats.deleted) == (
            len(self.alive),
            len(self.given) - len(self.alive),
        )
        assert store.size(self.pool) == len(self.alive)
        assert store.held(self.pool) == sum(row["held"] for row in self.alive.values())


@pytest.fixture(scope="module", params=DATABASES)
def database(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    folder: Path = tmp_path_factory.mktemp("model")
    yield database_url(request.param, request, folder / "pool.db")


def test_the_store_behaves_like_the_model(database: str) -> None:
    class Here(Pools):
        url = database

    PoolStore.open(database).close()
    run_state_machine_as_test(
        Here, settings=settings(max_examples=40, stateful_step_count=15, deadline=None)
    )
