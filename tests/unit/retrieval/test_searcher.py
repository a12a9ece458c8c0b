"""The searcher: what it finds, freshness, filters, deadlines, failures."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memshare.config import Config
from memshare.pool.errors import UnknownPool
from memshare.pool.store import PoolStore
from memshare.records import SearchAnswer
from memshare.retrieval import serving as serving_module
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.errors import EncoderError
from memshare.retrieval.filters import Filter
from memshare.retrieval.searcher import Searcher
from memshare.retrieval.worker import SearcherClosed, SearchTimeout
from tests.retrieving import (
    fill,
    find,
    ids,
    make_config,
    open_store,
    until,
)  # fmt: skip


def test_generation_zero_finds_what_brute_force_finds(
    store: PoolStore, searcher: Searcher, encoders: list[Encoder]
) -> None:
    memories = fill(store, "p", 40)
    searcher.wait_visible("p", memories[-1].seq, 60)
    answer = searcher.search("p", "river stone lamp", 5)
    vectors = encoders[0].encode_memories([(m.prompt, m.answer) for m in memories])
    order = np.argsort(-(vectors @ encoders[0].encode_queries(["river stone lamp"])[0]))
    assert answer.generation == 0
    assert ids(answer) == [memories[i].id for i in order[:5]]


def test_empty_pool_and_large_k(store: PoolStore, searcher: Searcher) -> None:
    assert searcher.search("p", "anything", 3, timeout=60) == SearchAnswer(0, ())
    memory = fill(store, "p", 3)[-1]
    searcher.wait_visible("p", memory.seq, 60)
    assert len(find(searcher, memory, k=10**6)) == 3


def test_pools_never_mix(store: PoolStore, searcher: Searcher) -> None:
    mine, theirs = fill(store, "p", 10), fill(store, "q", 10)
    searcher.wait_visible("p", mine[-1].seq, 60)
    searcher.wait_visible("q", theirs[-1].seq, 60)
    for memory in mine + theirs:
        own = mine if memory.pool == "p" else theirs
        assert set(find(searcher, memory)) == {other.id for other in own}


def test_unknown_pool_and_bad_k(searcher: Searcher) -> None:
    for call in (
        lambda: searcher.search("nowhere", "x", 1),
        lambda: searcher.wait_visible("nowhere", 1, 1),
        lambda: asyncio.run(searcher.asearch("nowhere", "x", 1)),
    ):
        with pytest.raises(UnknownPool, match="nowhere"):
            call()
    with pytest.raises(ValueError, match="k must be"):
        searcher.search("p", "x", 0)


def test_filters(store: PoolStore, searcher: Searcher) -> None:
    memories = fill(store, "p", 60)
    searcher.wait_visible("p", memories[-1].seq, 60)
    restrict = Filter("ann", created_after="2026-01-10", created_before="2026-02-20T00:00:00Z")
    expected = {
        m.id for m in memories if m.agent == "ann" and "2026-01-10" <= m.created_at < "2026-02-20T"
    }
    assert len(expected) > 3
    assert set(ids(searcher.search("p", "x", 1000, restrict))) == expected


def test_a_write_is_visible_after_wait_visible(store: PoolStore, searcher: Searcher) -> None:
    searcher.wait_ready(60)
    for i in range(10):
        memory = fill(store, "p", 1, seed=i)[0]
        searcher.wait_visible("p", memory.seq, 60)
        assert find(searcher, memory, 1) == [memory.id] or memory.id in find(searcher, memory)


def test_writes_by_others_are_found_by_polling(store: PoolStore, searcher: Searcher) -> None:
    searcher.wait_ready(60)
    memory = fill(store, "p", 1)[0]  # nobody notifies
    until(lambda: memory.id in find(searcher, memory))


def test_notify_is_quicker_than_the_poll(tmp_path: Path, folders: list[Path]) -> None:
    config = make_config(tmp_path, folders[0], poll_seconds=120)
    with open_store(config) as store, Searcher(store, config) as searcher:
        searcher.wait_ready(60)
        memory = fill(store, "p", 1)[0]
        searcher.notify("p")
        until(lambda: memory.id in find(searcher, memory))
        memory = fill(store, "p", 1, seed=1)[0]
        searcher.wait_visible("p", memory.seq, 30)  # that wakes it too


def test_an_error_goes_to_its_caller_alone(
    searcher: Searcher, store: PoolStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = fill(store, "p", 3)[0]
    searcher.wait_visible("p", store.last_seq("p"), 60)
    real = Encoder.encode_queries

    def picky(self: Encoder, prompts: Any) -> np.ndarray:
        if "poison" in prompts:
            raise EncoderError("no such text")
        return real(self, prompts)

    monkeypatch.setattr(Encoder, "encode_queries", picky)

    async def together() -> list[Any]:
        texts = ["a", "poison", "b", "c"] * 5
        calls = [searcher.asearch("p", text, 2) for text in texts]
        return await asyncio.gather(*calls, return_exceptions=True)

    results = asyncio.run(together())
    assert [isinstance(result, EncoderError) for result in results] == [
        False,
        True,
        False,
        False,
    ] * 5
    assert all(len(result.hits) == 2 for i, result in enumerate(results) if i % 4 != 1)
    assert find(searcher, memory) and searcher.stats().failed == 5


def test_concurrent_searches_share_batches(searcher: Searcher, store: PoolStore) -> None:
    fill(store, "p", 3)
    searcher.wait_visible("p", 3, 60)
    before = searcher.stats()

    async def together() -> list[SearchAnswer]:
        return await asyncio.gather(*[searcher.asearch("p", f"{i}", 1 + i % 3) for i in range(128)])

    answers = asyncio.run(together())
    after = searcher.stats()
    assert [len(answer.hits) for answer in answers] == [1 + i % 3 for i in range(128)]
    assert after.answered - before.answered == 128
    assert after.batches - before.batches < 64 and after.queue_depth == 0


def test_a_batch_has_no_more_searches_than_asked_for(tmp_path: Path, folders: list[Path]) -> None:
    config = make_config(tmp_path, folders[0], max_batch=4)
    with open_store(config) as store, Searcher(store, config) as searcher:
        searcher.wait_ready(60)

        async def together() -> None:
            await asyncio.gather(*[searcher.asearch("p", f"{i}", 1) for i in range(64)])

        asyncio.run(together())
        assert searcher.stats().batches >= 16


def test_deadlines(searcher: Searcher, monkeypatch: pytest.MonkeyPatch) -> None:
    searcher.wait_ready(60)
    free = threading.Event()
    real = Encoder.encode_queries

    def stuck(self: Encoder, prompts: Any) -> np.ndarray:
        free.wait(60)
        return real(self, prompts)

    monkeypatch.setattr(Encoder, "encode_queries", stuck)
    began = time.monotonic()
    with pytest.raises(SearchTimeout, match=r"0\.2 seconds: the searcher is busy"):
        searcher.search("p", "x", 1, timeout=0.2)
    with pytest.raises(SearchTimeout):
        asyncio.run(searcher.asearch("p", "x", 1, timeout=0.2))
    with pytest.raises(SearchTimeout, match="p is not at 99"):
        searcher.wait_visible("p", 99, 0.1)
    assert time.monotonic() - began < 30
    free.set()
    assert searcher.search("p", "x", 1, timeout=60).hits == ()


@pytest.mark.parametrize("outcome", [SearchAnswer(1, ()), EncoderError("no such text")])
def test_what_comes_as_the_time_is_up_goes_to_the_caller(
    searcher: Searcher, monkeypatch: pytest.MonkeyPatch, outcome: SearchAnswer | EncoderError
) -> None:
    class Late(Future[SearchAnswer]):
        """The worker is done between the end of the wait and the look at what came of it."""

        def result(self, timeout: float | None = None) -> SearchAnswer:
            if not self.done():
                self.set_running_or_notify_cancel()
                if isinstance(outcome, EncoderError):
                    self.set_exception(outcome)
                else:
                    self.set_result(outcome)
                raise TimeoutError
            return super().result(timeout)

    monkeypatch.setattr(searcher, "_submit", lambda *_: Late())
    if isinstance(outcome, EncoderError):
        with pytest.raises(EncoderError, match="no such text"):
            searcher.search("p", "x", 1, timeout=0.1)
    else:
        assert searcher.search("p", "x", 1, timeout=0.1) == outcome


def test_close_answers_what_was_accepted(store: PoolStore, config: Config) -> None:
    fill(store, "p", 3)
    searcher = Searcher(store, config).start()
    searcher.wait_ready(60)
    futures = [searcher._submit(_query(i), 60) for i in range(200)]
    searcher.close()
    assert all(len(future.result(0).hits) == 2 for future in futures)
    with pytest.raises(SearcherClosed):
        searcher.search("p", "x", 1)
    with pytest.raises(SearcherClosed):
        searcher.wait_visible("p", 10**6, 5)
    searcher.close()


def _query(i: int) -> serving_module.Query:
    return serving_module.Query("p", f"question {i}", 2)


def test_an_encoder_that_is_not_there(store: PoolStore, config: Config, tmp_path: Path) -> None:
    missing = config.encoder.model_copy(update={"model": str(tmp_path / "missing" / "encoder")})
    with closing(Searcher(store, config.model_copy(update={"encoder": missing}))) as searcher:
        searcher.start()
        with pytest.raises(EncoderError, match="missing"):
            searcher.wait_ready(60)
        with pytest.raises(EncoderError, match="missing"):
            searcher.search("p", "x", 1)


def test_a_database_that_is_away_for_a_while(
    store: PoolStore, searcher: Searcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memshare.pool.errors import PoolError

    memory = fill(store, "p", 3)[0]
    searcher.wait_visible("p", 3, 60)

    def away(*args: Any) -> Any:
        raise PoolError("the database is away")

    with monkeypatch.context() as patch:
        patch.setattr(PoolStore, "changes", away)
        late = fill(store, "p", 1, seed=5)[0]
        until(lambda: searcher.stats().feed_error is not None)
        assert "away" in str(searcher.stats().feed_error)
        assert len(find(searcher, memory)) == 3  # searches go on
        with pytest.raises(SearchTimeout, match="the database is away"):
            searcher.wait_visible("p", late.seq, 0.1)
    searcher.wait_visible("p", late.seq, 60)
    until(lambda: searcher.stats().feed_error is None)
