"""The durable queue: each pair is decided once, whoever dies or dawdles meanwhile."""

from __future__ import annotations

import threading
import time

import pytest

from memshare.pool import decisions
from memshare.pool.errors import PoolError, UnknownPool
from memshare.pool.ids import new_id
from memshare.pool.queue import ClaimLost, Job, PairQueue
from memshare.pool.store import PoolStore
from memshare.records import Pair


def pair(number: int) -> Pair:
    return Pair("main", f"question {number}", "yes", "stop", "ann", "m", {"n": number})


@pytest.fixture
def store(url: str) -> PoolStore:
    store = PoolStore.open(url)
    store.create_pool("main")
    return store


def decide(store: PoolStore, job: Job) -> None:
    with store.database.write() as connection:
        decisions.record(connection, "main", "stored", "h", None, None, None)
        PairQueue.finish(connection, job)


def test_what_is_put_is_claimed_once_in_order_and_whole(store: PoolStore) -> None:
    queue = PairQueue(store.database)
    queue.put([pair(0), pair(1)])
    queue.put([pair(2)])
    first = queue.claim(2, 60)
    assert [job.pair for job in first] == [pair(0), pair(1)]
    assert [job.pair for job in queue.claim(5, 60)] == [pair(2)]
    assert queue.claim(5, 60) == [] and queue.count() == 3
    for job in first:
        decide(store, job)
    assert queue.count() == 1
    with pytest.raises(ClaimLost):
        decide(store, first[0])
    assert store.decisions("main") == {"stored": 2}  # the third one was undone
    store.close()


def test_a_claim_that_ran_out_goes_to_another_and_the_late_one_is_undone(store: PoolStore) -> None:
    queue = PairQueue(store.database)
    queue.put([pair(0)])
    (late,) = queue.claim(1, 0.05)
    time.sleep(0.1)
    (job,) = queue.claim(1, 60)
    assert (job.id, job.attempts) == (late.id, 2)
    queue.renew([late.claim], 60)  # holds nothing any more
    queue.release([late])
    with pytest.raises(ClaimLost):
        decide(store, late)
    decide(store, job)
    assert store.decisions("main") == {"stored": 1}
    store.close()


def test_a_renewed_claim_holds_and_a_released_pair_is_free_at_once(store: PoolStore) -> None:
    queue = PairQueue(store.database)
    queue.put([pair(0)])
    (job,) = queue.claim(1, 0.2)
    queue.renew([job.claim], 60)
    time.sleep(0.3)
    assert queue.claim(1, 60) == []
    queue.release([job])
    (again,) = queue.claim(1, 60)
    assert again.attempts == 1  # that was no attempt
    queue.release([again], pause_seconds=0.3, counted=True)
    assert queue.claim(1, 60) == []
    time.sleep(0.4)
    (late,) = queue.claim(1, 60)
    assert late.attempts == 2
    store.close()


def test_a_claim_from_before_the_clock_was_set_back_is_over(store: PoolStore) -> None:
    queue = PairQueue(store.database)
    queue.put([pair(0), pair(1)])
    (kept,) = queue.claim(1, 90)  # another gateway's, whose leases are longer
    (lost,) = queue.claim(1, 3600 + 60)  # as one of 60 s looks once the clock is an hour behind
    (job,) = queue.claim(5, 60)
    assert job.id == lost.id
    decide(store, job)
    decide(store, kept)
    with pytest.raises(ClaimLost):
        decide(store, lost)
    store.close()


def test_a_pair_that_rests_longer_than_leases_last_rests_behind_the_others(
    store: PoolStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, now = PairQueue(store.database), [1000.0]
    monkeypatch.setattr(queue, "_now", lambda connection: now[0])
    queue.put([pair(0)])
    queue.put([pair(1)])
    (slow,) = queue.claim(1, 1)
    queue.release([slow], pause_seconds=50)  # fifty leases: no clock was set back
    (other,) = queue.claim(5, 1)
    assert other.pair == pair(1)
    queue.release([other], pause_seconds=20)
    now[0] += 60
    for number in (1, 0):  # in the order in which they became free
        (job,) = queue.claim(1, 60)
        assert job.pair == pair(number)
        decide(store, job)
    queue.put([pair(2)])
    queue.release(queue.claim(1, 60), pause_seconds=10_000)  # longer than any pair rests
    now[0] += 899
    assert queue.claim(5, 60) == []
    now[0] += 2
    assert [job.pair for job in queue.claim(5, 60)] == [pair(2)]
    store.close()


def test_what_was_put_before_the_clock_was_set_back_is_free(
    store: PoolStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = PairQueue(store.database)
    queue.put([pair(0)])
    monkeypatch.setattr(queue, "_now", lambda connection: time.time() - 3600)
    assert [job.pair for job in queue.claim(5, 60)] == [pair(0)]
    store.close()


def test_a_stopping_gateway_claims_only_what_was_there(store: PoolStore) -> None:
    queue = PairQueue(store.database)
    queue.put([pair(0)])
    last = new_id()
    queue.put([pair(1)])
    assert [job.pair for job in queue.claim(5, 60, last)] == [pair(0)]
    assert queue.claim(5, 60, last) == []
    store.close()


def test_a_pair_for_no_pool_takes_the_others_with_it(store: PoolStore) -> None:
    queue = PairQueue(store.database)
    with pytest.raises(UnknownPool):
        queue.put([pair(0), Pair("nowhere", "q", "a")])
    assert queue.count() == 0
    store.close()


def test_many_claimers_share_the_queue_and_decide_each_pair_once(store: PoolStore) -> None:
    queue = PairQueue(store.database)
    queue.put([pair(number) for number in range(60)])
    seen: list[str] = []
    failures: list[PoolError] = []

    def work() -> None:
        try:
            while jobs := queue.claim(3, 60):
                for job in jobs:
                    decide(store, job)
                    seen.append(job.id)
        except PoolError as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # On PostgreSQL a claimer may find all that is left locked by others, and end early.
    while jobs := queue.claim(100, 60):
        for job in jobs:
            decide(store, job)
            seen.append(job.id)
    assert not failures
    assert len(seen) == len(set(seen)) == 60
    assert store.decisions("main") == {"stored": 60} and queue.count() == 0
    store.close()
