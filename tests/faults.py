"""Writers under faults, and what must hold of their writes afterwards.

They behave like good clients: a write without an answer of 201 is sent again, whatever became of
the first try.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

import httpx

from memshare.config import Config
from memshare.pool.store import PoolStore
from memshare.retrieval.encoder import Encoder
from tests.retrieving import publish_now

WRITERS = 4
# A gateway says within this that a part of it is away. Longest waits a write that was stored just
# before, and should be searchable by now (`gateway.visible_timeout_seconds`).
REFUSAL_SECONDS = 35.0
PATIENCE_SECONDS = 90.0


class Restless:
    """Threads that never rest until a block ends; what they find wrong fails the test."""

    def __init__(self, work: Callable[[int], None], count: int) -> None:
        """Nothing is done until it is entered. ``work`` gets its number and heeds ``_stop``."""
        self.wrong: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=work, args=(place,)) for place in range(count)]

    @contextmanager
    def running(self) -> Iterator[Self]:
        """Work until the block ends; then all that is under way is seen to its end."""
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join()
        assert not self.wrong, self.wrong[:3]

    def until(self, condition: Callable[[], bool], seconds: float, problem: str) -> float:
        """Wait for ``condition``; returns the seconds that took."""
        began = time.monotonic()
        while not condition():
            assert not self.wrong, self.wrong[:3]
            assert time.monotonic() - began < seconds, problem
            time.sleep(0.02)
        return time.monotonic() - began


class Load(Restless):
    """Writers that never rest, each sending its next memory once the last one is acknowledged."""

    def __init__(self, url: str, killed: bool = False, pause: float = 0.0) -> None:
        """``killed``: the gateway may vanish in between: connections break or are refused.

        ``pause``: seconds that each writer waits between two memories.
        """
        super().__init__(self._write, WRITERS)
        self.acknowledged: dict[str, str] = {}  # prompt -> id
        self.refusals: list[httpx.Response] = []
        self.broken = 0  # connections
        self.slowest = 0.0
        self._url = url
        self._killed = killed
        self._pause = pause

    def more(self, count: int = 1, seconds: float = 60.0) -> float:
        """Wait for ``count`` further acknowledgements; returns the seconds that took."""
        target = len(self.acknowledged) + count
        problem = "no further write succeeded"
        return self.until(lambda: len(self.acknowledged) >= target, seconds, problem)

    def refused(self, seconds: float = 60.0) -> None:
        """Wait until each writer can have been refused."""
        target = len(self.refusals) + WRITERS
        self.until(lambda: len(self.refusals) >= target, seconds, "no write was refused")

    def _write(self, place: int) -> None:
        with httpx.Client(timeout=60) as client:
            for number in itertools.count():
                if self._stop.is_set():
                    return
                item = {"pool": "keep", "prompt": f"writer {place} says {number}"}
                item["answer"] = f"what {place} says {number} times"
                try:
                    self._send(client, item)
                    time.sleep(self._pause)
                except Exception as error:
                    self.wrong.append(f"{type(error).__name__}: {error}")
                    return

    def _send(self, client: httpx.Client, item: dict[str, str]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            began = time.monotonic()
            try:
                reply = client.post(f"{self._url}/v1/memories", json={"items": [item]})
            except httpx.TransportError:
                if not self._killed:
                    raise
                self.broken += 1
                time.sleep(0.05)
                continue
            self.slowest = max(self.slowest, time.monotonic() - began)
            if reply.status_code == 201:
                self.acknowledged[item["prompt"]] = reply.json()["results"][0]["id"]
                return
            assert reply.status_code == 503, reply.text
            self.refusals.append(reply)
            time.sleep(0.1)
        raise AssertionError(f"never acknowledged: {item['prompt']}")


def publish_next(config: Config, encoder: Encoder) -> int:
    """A further generation of what is in the pools now, beside whatever else goes on."""
    with PoolStore.open(config.url) as store:
        return publish_now(store, config, encoder)


def generation(url: str) -> int:
    """The one that answers now."""
    body = {"pool": "keep", "query": "writer", "k": 1}
    reply = httpx.post(f"{url}/v1/memories/search", json=body, timeout=60)
    return int(reply.raise_for_status().json()["generation"])


def check(database: str, url: str, load: Load) -> None:
    """All that was acknowledged is there once, in the pool and in searches; the log has no gap."""
    with PoolStore.open(database) as store:
        memories = list(store.iter("keep"))
        log = store.changes("keep", 0, limit=1_000_000)
    there = {memory.prompt: memory.id for memory in memories}
    assert len(there) == len(memories), "stored twice"
    lost = load.acknowledged.items() - there.items()
    assert not lost, f"acknowledged and lost: {lost}"
    # Every writer saw its last write to the end, so there is nothing that nobody was told of.
    assert there == load.acknowledged
    assert [change.seq for change in log] == list(range(1, len(memories) + 1))
    search = {"pool": "keep", "query": "writer", "k": 1000}
    reply = httpx.post(f"{url}/v1/memories/search", json=search, timeout=60)
    found = [memory["id"] for memory in reply.json()["memories"]]
    assert len(found) == min(1000, len(there)) and set(found) <= set(there.values())


def check_refusals(load: Load) -> None:
    """They come soon, in the usual form, and say when to try again."""
    for reply in load.refusals:
        assert int(reply.headers["Retry-After"]) > 0
        assert reply.json()["error"]["type"] == "service_unavailable_error"
    assert load.slowest < REFUSAL_SECONDS, f"a request took {load.slowest:.1f} s"
