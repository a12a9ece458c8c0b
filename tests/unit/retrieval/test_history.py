"""A database that went back in time: restored from a backup, or a standby without the last changes.

Its log ends before what was built from it, and then goes on differently.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from memshare.config import Config
from memshare.pool.errors import PoolError
from memshare.pool.store import PoolStore
from memshare.records import Memory
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.generation import generations
from memshare.retrieval.history import goes_on, mark_at
from memshare.retrieval.publish import activate
from memshare.retrieval.searcher import Searcher
from tests.retrieving import fill, find, open_store, publish_now, serves, until


@pytest.fixture
def restored(config: Config, store: PoolStore, tmp_path: Path) -> Iterator[PoolStore]:
    """A copy of the pools from when ``p`` had five memories."""
    fill(store, "p", 5)
    store.close()  # its log is in the file then
    shutil.copy(tmp_path / "run" / "pool.db", tmp_path / "backup.db")
    url = f"sqlite:///{tmp_path / 'backup.db'}"
    with open_store(config.model_copy(update={"database_url": url})) as opened:
        yield opened


def living(store: PoolStore) -> set[str]:
    return {memory.id for memory in store.iter("p")}


def lost_and_found(store: PoolStore, restored: PoolStore) -> tuple[list[Memory], list[Memory]]:
    """What only the lost log has, and what only the restored one has, at the same positions."""
    lost = fill(store, "p", 3, seed=1)
    found = fill(restored, "p", 3, seed=2)
    assert [memory.seq for memory in lost] == [memory.seq for memory in found] == [6, 7, 8]
    return lost, found


def test_marks_tell_logs_apart(store: PoolStore, restored: PoolStore) -> None:
    lost, _ = lost_and_found(store, restored)
    assert mark_at(store, "p", 8) == f"add {lost[-1].id}"
    assert goes_on(store, "p", 8, f"add {lost[-1].id}") and goes_on(store, "p", 8, None)
    assert not goes_on(restored, "p", 8, f"add {lost[-1].id}")
    assert goes_on(restored, "p", 8, None)  # a generation of an earlier version
    assert goes_on(restored, "p", 0, None) and goes_on(restored, "nobody", 0, None)
    assert not goes_on(restored, "p", 9, None) and not goes_on(restored, "nobody", 1, None)
    store.delete(lost[-1].id)
    assert mark_at(store, "p", 9) == f"delete {lost[-1].id}"


def test_a_generation_of_the_lost_log_is_completed_from_the_restored_one(
    store: PoolStore, restored: PoolStore, config: Config, encoders: list[Encoder]
) -> None:
    lost, found = lost_and_found(store, restored)
    publish_now(store, config, encoders[0])
    (manifest,) = generations(config.retriever_dir)
    assert manifest.marks == {"p": f"add {lost[-1].id}"}
    with Searcher(restored, config) as searcher:
        searcher.wait_ready(60)
        assert set(find(searcher, found[0])) == living(restored)
        publish_now(restored, config, encoders[1])
        serves(searcher, 2)
        activate(config.retriever_dir, 1)  # back to the one of the lost log
        serves(searcher, 1)
        assert set(find(searcher, found[0])) == living(restored)


class Replaced:
    """A store in whose place another one may come, as a database server is restored in place."""

    def __init__(self, store: PoolStore) -> None:
        self.now = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self.now, name)


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("more", [0, 1])
def test_a_searcher_outlives_a_restored_database(
    store: PoolStore,
    restored: PoolStore,
    config: Config,
    encoders: list[Encoder],
    published: bool,
    more: int,
) -> None:
    """Whether the log still ends before what was read, or is beyond it already."""
    if published:
        publish_now(store, config, encoders[0])
    lost = fill(store, "p", 3, seed=1)
    replaced = Replaced(store)
    with Searcher(cast(PoolStore, replaced), config) as searcher:
        searcher.wait_visible("p", store.last_seq("p"), 60)
        assert lost[0].id in find(searcher, lost[0])
        found = fill(restored, "p", 2 + 2 * more, seed=2)
        replaced.now = restored
        until(lambda: set(find(searcher, found[0])) == living(restored))
        until(lambda: searcher.stats().feed_error is None)
        late = fill(restored, "p", 1, seed=3)[0]
        searcher.wait_visible("p", late.seq, 60)
        assert set(find(searcher, late)) == living(restored)
        assert searcher.stats().generation == int(published)
        assert len(searcher.stats().swaps) == 2  # it was loaded anew once


class Away:
    """A database that does not answer."""

    def __getattr__(self, name: str) -> Any:
        raise PoolError("the database is away")


def test_a_pool_that_the_restored_database_lacks(
    store: PoolStore, config: Config, tmp_path: Path
) -> None:
    memory = fill(store, "p", 3)[0]
    replaced = Replaced(store)
    url = f"sqlite:///{tmp_path / 'empty.db'}"
    with PoolStore.open(url) as empty, Searcher(cast(PoolStore, replaced), config) as searcher:
        searcher.wait_visible("p", 3, 60)
        replaced.now = empty
        until(lambda: find(searcher, memory) == [])
        until(lambda: searcher.stats().feed_error is None)
        empty.create_pool("p")
        late = fill(empty, "p", 1, seed=1)[0]
        searcher.wait_visible("p", late.seq, 60)
        assert find(searcher, late) == [late.id]


def test_a_log_of_the_same_length_after_an_outage(
    store: PoolStore, restored: PoolStore, config: Config
) -> None:
    """As a standby has that lost changes, and took as many before a searcher reached it."""
    _, found = lost_and_found(store, restored)
    replaced = Replaced(store)
    with Searcher(cast(PoolStore, replaced), config) as searcher:
        searcher.wait_visible("p", 8, 60)
        replaced.now = cast(PoolStore, Away())
        until(lambda: searcher.stats().feed_error is not None)
        replaced.now = restored
        until(lambda: set(find(searcher, found[0])) == living(restored))
