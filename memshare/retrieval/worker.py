"""The one thread that searches: a queue, micro-batches, and what is done between two batches.

FAISS on a GPU is not safe to share even for reads, and neither is an encoder, so this thread alone
touches what serves. Changes to it (new rows, a swap) are steps that it runs between batches.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from memshare.records import SearchAnswer
from memshare.retrieval.delta import Snapshot
from memshare.retrieval.serving import Query, Serving


class SearchTimeout(TimeoutError):
    """No answer within the time that the caller gave."""


class SearcherClosed(RuntimeError):
    """The searcher was closed, or never started."""


@dataclass(slots=True)
class _Request:
    query: Query
    future: Future[SearchAnswer]
    queued: float
    deadline: float


class Worker:
    """Owns the `Serving` in use; `submit` and `run` may be called from any thread."""

    def __init__(self, max_batch: int, wait_seconds: float) -> None:
        """A batch has at most ``max_batch`` queries, the first of which waits ``wait_seconds``."""
        self.serving: Serving | None = None
        self.batches = 0
        self.answered = 0
        self.failed = 0
        self._max_batch = max_batch
        self._wait = wait_seconds
        self._requests: deque[_Request] = deque()
        self._steps: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="searcher-worker", daemon=True)

    @property
    def queued(self) -> int:
        """Searches that wait."""
        return len(self._requests)

    def start(self) -> None:
        """Start the thread; requests wait until a first `swap`."""
        self._thread.start()

    def close(self) -> None:
        """Answer what was accepted, then stop. Without anything to serve, the rest fails."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()
        self.fail_all(SearcherClosed("the searcher was closed before it was ready"))

    def submit(self, query: Query, timeout: float) -> Future[SearchAnswer]:
        """Queue a search. Its future fails with `SearchTimeout` if its turn comes too late."""
        now = time.monotonic()
        request = _Request(query, Future(), now, now + timeout)
        with self._changed:
            if self._closing:
                raise SearcherClosed("the searcher is closed")
            self._requests.append(request)
            self._changed.notify()
        return request.future

    def run(self, step: Callable[[], None]) -> None:
        """Run ``step`` in the worker's thread between two batches; returns or raises as it does."""
        future: Future[None] = Future()
        with self._changed:
            if self._closing:
                raise SearcherClosed("the searcher is closed")
            self._steps.append((step, future))
            self._changed.notify()
        future.result()

    def snapshot(self) -> dict[str, Snapshot]:
        """What is known of the rows that serve, taken between two batches; empty without any."""
        taken: dict[str, Snapshot] = {}

        def take() -> None:
            if self.serving is not None:
                taken.update(self.serving.snapshot())

        self.run(take)
        return taken

    def swap(self, serving: Serving) -> float:
        """Serve ``serving`` from the next batch on; the old one is closed after its last.

        What the old one held is free when this returns, by the calling thread: searches don't wait
        for that. Returns the seconds for which the worker was kept from searching.
        """
        seconds = 0.0
        old: Serving | None = None

        def assign() -> None:
            nonlocal seconds, old
            began = time.perf_counter()
            old, self.serving = self.serving, serving
            if old is not None:
                old.close()
            seconds = time.perf_counter() - began

        self.run(assign)
        del old  # the worker may hold `assign` until its next step
        return seconds

    def fail_all(self, error: Exception) -> None:
        """Fail everything that waits."""
        with self._changed:
            waiting = list(self._requests)
            self._requests.clear()
        for request in waiting:
            if request.future.set_running_or_notify_cancel():
                self.failed += 1
                request.future.set_exception(error)

    def _loop(self) -> None:
        step_was_last = False
        while True:
            with self._changed:
                while not self._steps and not (self._requests and self.serving):
                    if self._closing:
                        return
                    self._changed.wait()
                # In turns, so that neither a backlog of searches nor one of writes starves.
                searchable = bool(self._requests and self.serving)
                step_next = bool(self._steps) and not (step_was_last and searchable)
                step = self._steps.popleft() if step_next else None
                batch = [] if step is not None else self._take()
            step_was_last = step is not None
            if step is not None:
                _run_step(*step)
            else:
                self._answer(batch)

    def _take(self) -> list[_Request]:
        """The next batch; waits a little for it to fill. The caller holds the condition."""
        until = self._requests[0].queued + self._wait
        while len(self._requests) < self._max_batch and not self._steps and not self._closing:
            left = until - time.monotonic()
            if left <= 0:
                break
            self._changed.wait(left)
        count = min(len(self._requests), self._max_batch)
        return [self._requests.popleft() for _ in range(count)]

    def _answer(self, batch: list[_Request]) -> None:
        now = time.monotonic()
        live = []
        for request in batch:
            if not request.future.set_running_or_notify_cancel():
                continue  # its caller gave up
            if request.deadline < now:
                self.failed += 1
                request.future.set_exception(SearchTimeout("the search waited too long for a turn"))
            else:
                live.append(request)
        serving = self.serving  # read once: the whole batch is of one generation
        assert serving is not None
        if live:
            self.batches += 1
            self._answer_with(serving, live)

    def _answer_with(self, serving: Serving, live: list[_Request]) -> None:
        try:
            answers = serving.answer([request.query for request in live])
        except Exception as error:  # the caller's to handle: this thread serves the others
            if len(live) > 1:
                for request in live:  # one bad query must not fail those beside it
                    self._answer_with(serving, [request])
            else:
                self.failed += 1
                live[0].future.set_exception(error)
            return
        self.answered += len(live)
        for request, answer in zip(live, answers, strict=True):
            request.future.set_result(answer)


def _run_step(step: Callable[[], None], future: Future[None]) -> None:
    try:
        step()
    except BaseException as error:  # raised again in the thread that asked for the step
        future.set_exception(error)
    else:
        future.set_result(None)
