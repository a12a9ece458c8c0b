"""The next step's batch is made while the current one is learned from."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """``make(step)`` for one step after the other, made in a thread, one step ahead.

    ``make`` must depend on the step alone: then what is given, and in which order, is the same as
    without. No step from ``stop`` on is made ahead. What ``make`` raises is raised for its step,
    where that is asked for. The thread ends with the context.
    """

    def __init__(self, make: Callable[[int], T], stop: int) -> None:
        """Nothing is made before the first step is asked for."""
        self._make, self._stop = make, stop
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._ahead: dict[int, Future[T]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._worker.shutdown(cancel_futures=True)

    def __call__(self, step: int) -> T:
        """What was made for ``step``; the one after it is begun."""
        found = self._ahead.pop(step, None) or self._worker.submit(self._make, step)
        value = found.result()
        if step + 1 < self._stop:
            self._ahead = {step + 1: self._worker.submit(self._make, step + 1)}
        return value
