"""The hot-swapping searcher: answers go on while the generation under them is replaced.

Three threads. The *worker* owns what serves and answers in micro-batches; the *feeder* follows the
pools' change logs; the *loader* brings the next generation in. See the modules of these names.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType

from memshare.config import Config
from memshare.pool.errors import UnknownPool
from memshare.pool.store import PoolStore
from memshare.records import SearchAnswer
from memshare.retrieval.feeder import Feeder
from memshare.retrieval.filters import Filter
from memshare.retrieval.loader import Loader, SwapRecord
from memshare.retrieval.serving import Query
from memshare.retrieval.worker import SearcherClosed, SearchTimeout, Worker


class NotServed(UnknownPool):
    """The retriever doesn't search this pool, whether there is one of the name or not."""


@dataclass(frozen=True, slots=True)
class SearcherStats:
    """For /metrics. ``generation`` None: not ready. Errors: those not overcome yet, else None."""

    generation: int | None
    queue_depth: int
    batches: int
    answered: int
    failed: int
    positions: dict[str, int]
    delta_rows: int
    swaps: tuple[SwapRecord, ...]
    generation_error: str | None
    feed_error: str | None


class Searcher:
    """Searches the pools that a configuration's retriever serves. Thread-safe.

    Before anything was published it serves generation 0: the configured encoder, every memory in
    the delta.
    """

    def __init__(self, store: PoolStore, config: Config) -> None:
        """Nothing runs until `start`; the store stays open until after `close`."""
        retriever = config.retriever
        self._name = retriever.name
        self._pools = dict.fromkeys(config.served_pools)  # in order, and found at once
        self._closed = False
        self._moved = threading.Condition()  # a position or readiness changed
        self._worker = Worker(retriever.max_batch, retriever.batch_wait_seconds)
        self._feeder = Feeder(store, self._worker, retriever.poll_seconds, self._announce)
        self._loader = Loader(store, config, self._worker, self._feeder, self._announce)

    def start(self) -> Searcher:
        """Start the threads and return at once; searches wait until the first load is done."""
        for part in (self._worker, self._feeder, self._loader):
            part.start()
        return self

    def close(self) -> None:
        """Refuse new searches, answer those accepted, stop the threads, give the lease back."""
        self._closed = True
        self._announce()
        for part in (self._loader, self._feeder, self._worker):
            part.close()
        if self._worker.serving is not None:
            self._worker.serving.close()

    def __enter__(self) -> Searcher:
        """Start."""
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    # Searching

    def search(
        self, pool: str, query: str, k: int, filter: Filter | None = None, timeout: float = 30.0
    ) -> SearchAnswer:
        """The k best memories of ``pool`` for the question ``query``, by one generation.

        Fewer than k only where the pool has fewer that pass the filter; held and deleted ones never
        count. Raises `NotServed`, `SearchTimeout` after ``timeout`` seconds, `SearcherClosed`, and
        what the search itself raised.
        """
        return self._await(Query(pool, query, k, filter), timeout)

    def nearest(
        self, pool: str, prompt: str, answer: str, k: int, timeout: float = 30.0
    ) -> SearchAnswer:
        """The k memories of ``pool`` nearest to a memory, there or not, by the memories' tower.

        Raises as `search`.
        """
        return self._await(Query(pool, prompt, k, answer=answer), timeout)

    def _await(self, query: Query, timeout: float) -> SearchAnswer:
        future = self._submit(query, timeout)
        try:
            return future.result(timeout)
        except TimeoutError:
            future.cancel()
        if future.done() and not future.cancelled():
            return future.result()  # the worker's own error, or its answer, come this instant
        raise self._timeout(timeout)

    async def asearch(
        self, pool: str, query: str, k: int, filter: Filter | None = None, timeout: float = 30.0
    ) -> SearchAnswer:
        """`search` for a coroutine; cancelling it takes the search out of the queue."""
        future = self._submit(Query(pool, query, k, filter), timeout)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), timeout)
        except SearchTimeout:
            raise
        except TimeoutError:
            raise self._timeout(timeout) from None

    def _submit(self, query: Query, timeout: float) -> Future[SearchAnswer]:
        if self._closed:
            raise SearcherClosed("the searcher is closed")
        if query.pool not in self._pools:
            raise NotServed(
                f"pool {query.pool!r} is not served; retriever {self._name} serves "
                f"{', '.join(self._pools)}"
            )
        if query.k < 1:
            raise ValueError(f"k must be at least 1, got {query.k}")
        if self._loader.fatal is not None:
            raise self._loader.fatal
        return self._worker.submit(query, timeout)

    def _timeout(self, seconds: float) -> SearchTimeout:
        state = "busy" if self.ready else "not ready yet"
        return SearchTimeout(f"no answer within {seconds:g} seconds: the searcher is {state}")

    # What is searchable

    @property
    def ready(self) -> bool:
        """Whether a generation, with all memories there were at its loading, is searchable."""
        return self._worker.serving is not None

    def wait_ready(self, timeout: float) -> None:
        """Block until `ready`. Raises `SearchTimeout`, or what makes it impossible."""
        self._wait(lambda: self.ready, timeout, "nothing is loaded")

    def notify(self, pool: str) -> None:
        """Say that ``pool`` changed, so that the delta takes it in now and not at the next poll."""
        if pool in self._pools:
            self._feeder.wake()

    def wait_visible(self, pool: str, seq: int, timeout: float) -> None:
        """Block until every change of ``pool`` up to ``seq`` is in effect in searches.

        Raises `SearchTimeout` and `NotServed`.
        """
        if pool not in self._pools:
            raise NotServed(f"pool {pool!r} is not served by retriever {self._name}")
        self._feeder.wake()
        self._wait(lambda: self._position(pool) >= seq, timeout, f"{pool} is not at {seq}")

    def stats(self) -> SearcherStats:
        """Figures as of now."""
        serving, worker = self._worker.serving, self._worker
        shards = {} if serving is None else serving.shards
        return SearcherStats(
            generation=None if serving is None else serving.number,
            queue_depth=worker.queued,
            batches=worker.batches,
            answered=worker.answered,
            failed=worker.failed,
            positions={pool: shard.position for pool, shard in shards.items()},
            delta_rows=0 if serving is None else serving.delta_rows,
            swaps=self._loader.swaps,
            generation_error=self._loader.error,
            feed_error=self._feeder.error,
        )

    def _position(self, pool: str) -> int:
        serving = self._worker.serving
        return -1 if serving is None else serving.shards[pool].position

    def _wait(self, done: Callable[[], bool], timeout: float, problem: str) -> None:
        def over() -> bool:
            return done() or self._loader.fatal is not None or self._closed

        with self._moved:
            self._moved.wait_for(over, timeout)
        if done():
            return
        if self._loader.fatal is not None:
            raise self._loader.fatal
        if self._closed:
            raise SearcherClosed("the searcher is closed")
        why = self._loader.error if not self.ready else self._feeder.error
        raise SearchTimeout(f"{problem} after {timeout:g} seconds" + (f": {why}" if why else ""))

    def _announce(self) -> None:
        with self._moved:
            self._moved.notify_all()
