"""The next step's batch is made while the current one is learned from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def prefetched(make: Callable[[int], T], stop: int) -> Iterator[Callable[[int], T]]:
    """``make(step)`` for one step after the other, made in a thread, one step ahead.

    ``make`` must depend on the step alone: then what is given, and in which order, is the same as
    without. Nothing is made before the first step is asked for, and no step from ``stop`` on is
    made ahead. What ``make`` raises is raised for its step, where that is asked for. The thread
    ends with the context.
    """
    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
    ahead: dict[int, Future[T]] = {}

    def made(step: int) -> T:
        found = ahead.pop(step, None) or worker.submit(make, step)
        ahead.clear()
        value = found.result()
        if step + 1 < stop:
            ahead[step + 1] = worker.submit(make, step + 1)
        return value

    try:
        yield made
    finally:
        worker.shutdown(cancel_futures=True)
