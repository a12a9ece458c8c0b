"""Faults of the LLM server under load: killed and stalled. Memories are served all the while.

The LLM server here is a gateway of our own over a tiny random model, in a process of its own: as
OpenAI-compatible as vLLM is, and up in seconds.
"""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa

from memshare.pool.queue import PairQueue
from memshare.pool.schema import decisions
from memshare.pool.store import PoolStore
from memshare.sharing import prompt_hash
from tests.faults import Load, Restless, check
from tests.gateways import gateway, launch, wait_ready
from tests.loop import loop_config_file
from tests.postgres import free_port

TIMEOUT_SECONDS = 2.0  # of the gateway for its LLM
REFUSAL_SECONDS = 10.0  # a chat is answered or refused by then, whatever the LLM does
RECOVERY_SECONDS = 15.0  # from the LLM's return to the first chat that is answered
DECIDED_SECONDS = 60.0  # from the LLM's return to the decision on the last pair


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


class LLMServer:
    """The process behind the gateway."""

    def __init__(self, folder: Path, models: Path) -> None:
        self.port = free_port()
        self._folder = folder
        self._config = loop_config_file(folder, models)
        self._log = (folder / "llm.log").open("w")
        self.process: subprocess.Popen[str]

    def start(self) -> None:
        """Start it, and return once it answers."""
        (self._folder / "gateway.json").unlink(missing_ok=True)
        port = str(self.port)
        self.process = launch("serve/gateway.py", self._config, "--port", port, log=self._log)
        wait_ready(self.process, self._folder)

    def kill(self) -> None:
        """``kill -9``."""
        self.process.kill()
        self.process.wait()


@pytest.fixture
def llm(tmp_path: Path, models: Path) -> Iterator[LLMServer]:
    server = LLMServer(tmp_path / "llm", models)
    server.start()
    yield server
    server.kill()


class Chats(Restless):
    """Asks without rest; pairs are written where they can be."""

    def __init__(self, url: str) -> None:
        super().__init__(self._run, 2)
        self.answered = 0
        self.pending: list[str] = []  # questions whose pair was taken for scoring
        self.refusals: list[httpx.Response] = []
        self.slowest = 0.0
        self._url = url

    def more(self, seconds: float) -> float:
        target = self.answered + 1
        return self.until(lambda: self.answered >= target, seconds, "no chat was answered")

    def refused(self) -> None:
        target = len(self.refusals) + 2
        self.until(lambda: len(self.refusals) >= target, 60, "no chat was refused")

    def _run(self, place: int) -> None:
        number = 0
        with httpx.Client(timeout=60) as client:
            while not self._stop.is_set():
                number += 1
                question = f"chat {place} asks {number}"
                body = {"messages": [{"role": "user", "content": question}], "stop": list("aeiou")}
                began = time.monotonic()
                reply = client.post(f"{self._url}/v1/chat/completions", json=body)
                self.slowest = max(self.slowest, time.monotonic() - began)
                if reply.status_code == 200:
                    self.answered += 1
                    if reply.json()["memshare"]["write"] == "pending":
                        self.pending.append(question)
                elif reply.status_code == 503 and int(reply.headers["Retry-After"]) > 0:
                    self.refusals.append(reply)
                    time.sleep(0.1)
                else:
                    self.wrong.append(f"{reply.status_code}: {reply.text}")
                    return


@contextmanager
def front(tmp_path: Path, models: Path, llm: LLMServer) -> Iterator[str]:
    """The gateway whose agent and scorer are that server."""
    section = {
        "backend": "openai", "model": "tiny", "url": f"http://127.0.0.1:{llm.port}", "retries": 0,
        "timeout_seconds": TIMEOUT_SECONDS, "context_length": 512,
    }  # fmt: skip
    with gateway(
        tmp_path / "run", models, agent_llm=section, scorer_llm=section,
        scorer={"kind": "rubric", "max_tokens": 8},
    ) as url:  # fmt: skip
        yield url


def check_decisions(database: str, asked: list[str]) -> None:
    """Every pair that was taken is decided soon, and once."""
    with PoolStore.open(database) as store:
        queue = PairQueue(store.database)
        deadline = time.monotonic() + DECIDED_SECONDS
        while queue.count():
            assert time.monotonic() < deadline, f"{queue.count()} pairs are never decided"
            time.sleep(0.05)
        with store.database.read() as connection:
            counts = Counter(connection.scalars(sa.select(decisions.c.prompt_hash)))
    assert set(counts.values()) == {1}
    assert all(counts[prompt_hash(question)] == 1 for question in asked)


def test_killed_under_load(tmp_path: Path, models: Path, llm: LLMServer) -> None:
    rng = random.Random(2)
    database = f"sqlite:///{tmp_path}/run/pool.db"
    with front(tmp_path, models, llm) as url:
        with Load(url).running() as load, Chats(url).running() as chats:
            chats.until(lambda: len(chats.pending) >= 3, 60, "nothing is written")
            time.sleep(rng.random())
            llm.kill()
            chats.refused()
            load.more(20)  # the memory path is up
            llm.start()
            recovery = chats.more(RECOVERY_SECONDS)
        check_both(database, url, load, chats)
    print(f"{recovery:.2f} s to recover, {len(chats.refusals)} refusals")


def test_stalled_under_load(tmp_path: Path, models: Path, llm: LLMServer) -> None:
    """It takes connections and requests, and answers none: slower than any patience."""
    database = f"sqlite:///{tmp_path}/run/pool.db"
    with front(tmp_path, models, llm) as url:
        with Load(url).running() as load, Chats(url).running() as chats:
            chats.more(60)
            llm.process.send_signal(signal.SIGSTOP)
            chats.refused()
            load.more(20, seconds=20)  # the memory path is up
            llm.process.send_signal(signal.SIGCONT)
            recovery = chats.more(RECOVERY_SECONDS)
        check_both(database, url, load, chats)
    print(f"{recovery:.2f} s to recover, {len(chats.refusals)} refusals")


def check_both(database: str, url: str, load: Load, chats: Chats) -> None:
    """No write was refused, no chat waited long, every pair was decided, no memory is lost."""
    assert not load.refusals
    assert chats.slowest < REFUSAL_SECONDS, f"a chat took {chats.slowest:.1f} s"
    check_decisions(database, chats.pending)
    check_written(database, url, load)


def check_written(database: str, url: str, load: Load) -> None:
    """As `check`, beside what the chats' pairs may have added."""
    with PoolStore.open(database) as store:
        for memory in store.iter("keep"):
            if memory.prompt.startswith("chat "):
                load.acknowledged[memory.prompt] = memory.id
    check(database, url, load)
