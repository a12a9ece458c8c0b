"""Faults under load: what was acknowledged is kept, nothing is stored twice, and service returns.

The writers here behave like good clients: a write without an answer of 201 is sent again, whatever
became of the first try.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from memshare.pool import PoolStore
from tests.gateways import gateway
from tests.postgres import PostgresServer
from tests.proxy import Proxy

pytestmark = pytest.mark.server
WRITERS = 4
RECOVERY_SECONDS = 15.0  # from the database's return to the first write that is acknowledged
# A gateway says within this that its database is away. Longest waits a write that was stored just
# before, and should be searchable by now (`gateway.visible_timeout_seconds`).
REFUSAL_SECONDS = 35.0
PATIENCE_SECONDS = 90.0


class Load:
    """Writers that never rest, each sending its next memory once the last one is acknowledged."""

    def __init__(self, url: str) -> None:
        """Nothing is sent until it is entered as a context."""
        self.acknowledged: dict[str, str] = {}  # prompt -> id
        self.refusals: list[httpx.Response] = []
        self.slowest = 0.0
        self.wrong: list[str] = []
        self._url = url
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._write, args=(n,)) for n in range(WRITERS)]

    @contextmanager
    def running(self) -> Iterator[Load]:
        """Send until the block ends; then every write under way is seen to its end."""
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join()
        assert not self.wrong, self.wrong

    def more(self, count: int = 1, seconds: float = 60.0) -> float:
        """Wait for ``count`` further acknowledgements; returns the seconds that took."""
        began = time.monotonic()
        target = len(self.acknowledged) + count
        self._until(lambda: len(self.acknowledged) >= target, seconds, "no further write succeeded")
        return time.monotonic() - began

    def refused(self, seconds: float = 60.0) -> None:
        """Wait until each writer can have been refused."""
        target = len(self.refusals) + WRITERS
        self._until(lambda: len(self.refusals) >= target, seconds, "no write was refused")

    def _until(self, condition: Callable[[], bool], seconds: float, problem: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert not self.wrong, self.wrong
            assert time.monotonic() < deadline, problem
            time.sleep(0.02)

    def _write(self, place: int) -> None:
        with httpx.Client(timeout=60) as client:
            for number in itertools.count():
                if self._stop.is_set():
                    return
                item = {"pool": "keep", "prompt": f"writer {place} says {number}", "answer": "yes"}
                try:
                    self._send(client, item)
                except Exception as error:
                    self.wrong.append(f"{type(error).__name__}: {error}")
                    return

    def _send(self, client: httpx.Client, item: dict[str, str]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            began = time.monotonic()
            reply = client.post(f"{self._url}/v1/memories", json={"items": [item]})
            self.slowest = max(self.slowest, time.monotonic() - began)
            if reply.status_code == 201:
                self.acknowledged[item["prompt"]] = reply.json()["results"][0]["id"]
                return
            assert reply.status_code == 503, reply.text
            self.refusals.append(reply)
            time.sleep(0.1)
        raise AssertionError(f"never acknowledged: {item['prompt']}: {reply.text}")


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


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """One of its own: it is killed here."""
    own = PostgresServer()
    yield own
    own.close()


def test_postgresql_killed_under_load(server: PostgresServer, tmp_path: Path, models: Path) -> None:
    rng = random.Random(0)
    database = server.url(server.create())
    recoveries = []
    with gateway(tmp_path, models, database_url=database) as url, Load(url).running() as load:
        for _ in range(3):
            load.more(rng.randrange(10, 40))
            time.sleep(rng.random() * 0.3)
            server.kill()
            load.refused()
            assert httpx.get(f"{url}/healthz", timeout=5).status_code == 200
            server.start()
            recoveries.append(load.more())
        load.more(20)
    assert max(recoveries) < RECOVERY_SECONDS, f"seconds to recover: {recoveries}"
    print("seconds to recover:", recoveries)
    check_refusals(load)
    with gateway(tmp_path, models, database_url=database) as url:
        check(database, url, load)


def test_network_to_the_database_cut(
    postgres: PostgresServer, tmp_path: Path, models: Path
) -> None:
    name = postgres.create()
    with (
        Proxy(postgres.port) as proxy,
        gateway(tmp_path, models, database_url=postgres.url(name, proxy.port)) as url,
    ):
        with Load(url).running() as load:
            load.more(20)
            proxy.cut()
            load.refused()
            proxy.mend()
            recovery = load.more()
            load.more(20)
        check_refusals(load)
        check(postgres.url(name), url, load)
    assert recovery < RECOVERY_SECONDS, f"{recovery:.1f} s to recover"
    print(f"{recovery:.1f} s to recover")
