"""Waiting for a database that is away, in programs that nobody waits for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_when_event_set,
    wait_random_exponential,
)

from memshare.pool.errors import PoolUnavailable
from memshare.progress import log

LONGEST_SECONDS = 30.0  # between two tries

P = ParamSpec("P")
T = TypeVar("T")


def when_available(
    stop: threading.Event, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """What ``call`` returns, tried again with growing pauses while its database is away.

    Every failure is logged with its reason. Once ``stop`` is set, the last `PoolUnavailable` is
    raised.
    """
    tries = Retrying(
        retry=retry_if_exception_type(PoolUnavailable),
        wait=wait_random_exponential(multiplier=1.0, max=LONGEST_SECONDS),
        sleep=sleep_using_event(stop),
        stop=stop_when_event_set(stop),
        before_sleep=_tell,
        reraise=True,
    )
    return tries(call, *args, **kwargs)


def _tell(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    log(f"the database is away ({error}); waiting for it")
