"""A memory leaves what is known of it to its heir, while others tell more of the heir."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa
from sqlalchemy import event

from memshare.pool.feedback import Feedback, Standing
from memshare.pool.store import PoolStore
from memshare.pool.uses import UseCounts
from memshare.records import NewMemory

COMMIT_SECONDS = 0.5  # enough for the other transaction to come as far as it can


@pytest.fixture
def stores(url: str) -> Iterator[tuple[PoolStore, PoolStore]]:
    """Two processes' stores over one database."""
    with PoolStore.open(url) as one, PoolStore(url) as other:
        one.create_pool("main")
        yield one, other


@pytest.fixture
def ids(stores: tuple[PoolStore, PoolStore]) -> tuple[str, str]:
    """A memory and its heir."""
    new = [NewMemory("main", prompt, "a") for prompt in ("old", "new")]
    old, heir = (result.id for result in stores[0].append(new))
    return old, heir


def overlap(store: PoolStore, first: Callable[[], object], second: Callable[[], object]) -> None:
    """``second`` runs after all that ``first`` does in ``store``, but before its commit."""
    written, ended = threading.Event(), threading.Event()

    def before_commit(_: sa.Connection) -> None:
        if not written.is_set():
            written.set()
            ended.wait(COMMIT_SECONDS)

    failed: list[BaseException] = []

    def run() -> None:
        try:
            first()
        except BaseException as error:
            failed.append(error)

    event.listen(store.database.engine, "commit", before_commit)
    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert written.wait(10)
        second()
    finally:
        ended.set()
        thread.join()
    assert not failed, failed


@pytest.mark.parametrize("heir_first", [True, False])
def test_uses_counted_meanwhile_are_added_up(
    stores: tuple[PoolStore, PoolStore], ids: tuple[str, str], heir_first: bool
) -> None:
    one, other = stores
    old, heir = ids
    UseCounts(one.database).add({old: 2})

    def count() -> None:
        UseCounts(other.database).add({old: 4, heir: 8})

    def leave() -> None:
        assert one.delete(old, heir)

    overlap(*(one, leave, count) if heir_first else (other, count, leave))
    # What is counted of a memory that is gone by then is nobody's.
    assert UseCounts(one.database).of_pool("main") == {heir: 10 if heir_first else 14}


@pytest.mark.parametrize("heir_first", [True, False])
def test_an_opinion_given_meanwhile_is_the_principals_one(
    stores: tuple[PoolStore, PoolStore], ids: tuple[str, str], heir_first: bool
) -> None:
    one, other = stores
    old, heir = ids
    Feedback(one.database).give(old, "ann", -1.0)

    def vote() -> None:
        assert Feedback(other.database).give(heir, "ann", 1.0) == Standing(1 / 3, 1)

    def leave() -> None:
        assert one.delete(old, heir)

    overlap(*(one, leave, vote) if heir_first else (other, vote, leave))
    assert Feedback(one.database).of_pool("main") == {heir: Standing(1 / 3, 1)}
