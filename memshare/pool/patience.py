"""Waiting for a database that is away, in programs that nobody waits for; and for its readers."""

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
from memshare.pool.store import PoolStore
from memshare.progress import log

LONGEST_SECONDS = 30.0  # between two tries
SCRUB_SECONDS = 5.0

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


def scrub_or_tell(store: PoolStore) -> None:
    """`PoolStore.scrub` for up to `SCRUB_SECONDS`; a line says so where that was in vain."""
    if not store.scrub(SCRUB_SECONDS):
        log(
            f"warning: {store.database.name}: somebody goes on reading it, so that the text that "
            "was deleted stays readable in its log (-wal) for now. A gateway or a loop that runs "
            "overwrites it once nobody reads; so does the next deletion"
        )


def _tell(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    log(f"the database is away ({error}); waiting for it")
