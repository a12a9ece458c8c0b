"""The feeder thread: it follows the pools' change logs, so that serving rows stay up to date."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from memshare.pool.store import PoolStore
from memshare.progress import log
from memshare.retrieval.history import AnotherHistory
from memshare.retrieval.worker import SearcherClosed, Worker

_STEP = 16  # new memories encoded between two batches: what a search may have to wait for
MAX_BACKOFF = 30.0
_RETRY_SECONDS = 2.0  # at most: what was written is searchable so soon after a failure is over


class Feeder:
    """Reads changes in its own thread; the worker takes them in between batches."""

    def __init__(
        self, store: PoolStore, worker: Worker, poll_seconds: float, announce: Callable[[], None]
    ) -> None:
        """``announce`` is called whenever more has become searchable."""
        self.error: str | None = None
        self.astray = False  # what serves was read from another history: the loader's to mend
        self._store = store
        self._worker = worker
        self._poll = poll_seconds
        self._announce = announce
        self._stop = threading.Event()
        self._woken = threading.Event()
        self._feeding = threading.Lock()  # held while rows of what serves change
        self._unpaused = threading.Event()  # cleared by who wants `_feeding` next: locks are unfair
        self._unpaused.set()
        self._thread = threading.Thread(target=self._loop, name="searcher-feeder", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop the thread; the worker must still run."""
        self._stop.set()
        self._woken.set()
        if self._thread.ident is not None:
            self._thread.join()

    def wake(self) -> None:
        """Look for changes now, not at the next poll."""
        self._woken.set()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing that serves gains or loses rows inside; for the last moments before a swap."""
        self._unpaused.clear()
        try:
            with self._feeding:
                yield
        finally:
            self._unpaused.set()

    def _loop(self) -> None:
        with self._store.listening(self.wake):
            self._follow()

    def _follow(self) -> None:
        wait = self._poll
        while not self._stop.is_set():
            self._woken.wait(wait)
            self._woken.clear()
            try:
                while self._step() and not self._stop.is_set():
                    pass
                self.error, wait = None, self._poll
            except SearcherClosed:
                return
            except Exception as error:  # such as a database that is away: searches go on meanwhile
                self.error = report("new memories can't be taken in", error, self.error)
                self.astray = isinstance(error, AnotherHistory)
                self._stop.wait(wait)  # not woken early: every writer waits for the same thing
                wait = max(self._poll, min(2 * wait, _RETRY_SECONDS))

    def _step(self) -> bool:
        """Take in a page of each pool's changes; False if there were none."""
        self._unpaused.wait()
        with self._feeding:
            serving = self._worker.serving
            if serving is None:
                return False
            progress = False
            # After an outage all are looked at: their logs may be other ones of the same length.
            for pool in serving.behind(self._store) if self.error is None else serving.shards:
                progress |= serving.feed(self._store, pool, self._worker.run, _STEP)
                self._announce()
            return progress


def report(what: str, error: Exception, before: str | None) -> str:
    """The error as kept in the stats; logged if it is another one than ``before``."""
    text = f"{what}: {type(error).__name__}: {error}"
    if text != before:
        log(text)
    return text
