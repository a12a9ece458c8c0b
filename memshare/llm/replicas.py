"""Which of several equal servers a request goes to: in turn, and past those that fail.

One that refuses connections or lets a request time out is left out for a while, twice as long after
each failure in a row. Then one request at a time tries it, until one succeeds. Where all of them
are out, the one that is due first is tried: a request is never refused for want of a server. When
one goes out or comes back, that is logged, once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence

from memshare.config import without_secrets
from memshare.progress import log

FIRST_REST_SECONDS = 2.0
LONGEST_REST_SECONDS = 60.0


class Replicas:
    """Thread-safe: the event loops of several threads may share it."""

    def __init__(
        self, urls: Sequence[str], *, rest: float = FIRST_REST_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """``urls`` of servers that answer alike, at least one; ``rest`` in seconds."""
        self.urls = tuple(urls)
        self._rest = rest
        self._clock = clock
        self._lock = threading.Lock()
        self._turn = 0
        self._failures = dict.fromkeys(self.urls, 0)  # in a row
        self._due = dict.fromkeys(self.urls, 0.0)
        self._on_trial: set[str] = set()

    def pick(self, tried: Collection[str] = ()) -> str:
        """The next one in turn that is in service, of those not ``tried`` as long as there are any.

        Its success or failure must be told: one that was out stays out for others until then.
        """
        with self._lock:
            now = self._clock()
            order = self.urls[self._turn :] + self.urls[: self._turn]
            fresh = [url for url in order if url not in tried] or list(order)
            url = next((url for url in fresh if self._due[url] <= now), None)
            if url is None:  # all of those are out; one that was tried may be in service
                url = min(self.urls, key=lambda each: self._due[each])
            if self._failures[url]:
                self._due[url] = now + self._pause(url)
                self._on_trial.add(url)
            self._turn = (self.urls.index(url) + 1) % len(self.urls)
            return url

    def worked(self, url: str) -> None:
        """It answered, whatever it said."""
        with self._lock:
            was_out = self._failures[url] > 0
            self._failures[url], self._due[url] = 0, 0.0
            self._on_trial.discard(url)
        if was_out:
            log(f"LLM server {without_secrets(url)} answers again")

    def failed(self, url: str) -> None:
        """It could not be reached, or did not answer in time."""
        with self._lock:
            now = self._clock()
            if now < self._due[url] and url not in self._on_trial:
                return  # one of the many that were under way when it was left out: no failure more
            self._failures[url] += 1
            first = self._failures[url] == 1
            self._due[url] = now + self._pause(url)
            self._on_trial.discard(url)
        if first:
            log(f"LLM server {without_secrets(url)} does not answer")

    def _pause(self, url: str) -> float:
        longest: float = self._rest * 2.0 ** min(self._failures[url] - 1, 10)
        return min(longest, LONGEST_REST_SECONDS)
