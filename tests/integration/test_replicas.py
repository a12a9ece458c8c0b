"""Two LLM servers behind one backend, one of them killed under load: no request fails.

The servers are processes that speak vLLM's protocol (tests/fake_vllm.py), so that they can be
killed and started again at once; what is tested is what stands before them.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from memshare.config import LLMConfig
from memshare.llm.base import Chat, LLMUnavailable, LogLikelihood
from memshare.llm.vllm import VLLMBackend
from tests.tiny_lm import tiny_lm

SERVER = Path(__file__).parents[1] / "fake_vllm.py"
SECONDS = 0.05  # of one answer
ASK: Any = [{"role": "user", "content": "x"}]


class Servers:
    """As many as there are ports, on ports that were free."""

    def __init__(self, model: Path, count: int) -> None:
        probes = [socket.socket() for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        self.ports = [probe.getsockname()[1] for probe in probes]
        for probe in probes:
            probe.close()
        self.model = model
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, port: int) -> None:
        words = [sys.executable, str(SERVER), str(port), str(self.model), str(SECONDS)]
        self.processes[port] = subprocess.Popen(words)
        for _ in range(400):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
                return
            time.sleep(0.05)
        raise AssertionError("a server did not start")

    def kill(self, port: int) -> None:
        self.processes[port].send_signal(signal.SIGKILL)
        self.processes[port].wait()


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    made = Servers(tiny_lm(tmp_path / "lm", context=2048), 2)
    for port in made.ports:
        made.start(port)
    yield made
    for process in made.processes.values():
        process.kill()
        process.wait()


def backend(servers: Servers, **more: Any) -> VLLMBackend:
    urls = [f"http://127.0.0.1:{port}" for port in servers.ports]
    settings = {"retries": 0, "timeout_seconds": 5.0, "max_concurrency": 16, **more}
    config = LLMConfig(backend="vllm", model=str(servers.model), url=urls, **settings)
    return VLLMBackend(str(servers.model), config, backoff_seconds=0.01)


async def streamed(llm: VLLMBackend) -> str:
    parts = [
        event["choices"][0]["delta"]["content"]
        async for event in llm.stream(Chat(ASK, max_tokens=4))
    ]
    assert parts[1:] == ["!"]
    return str(parts[0])


def test_one_killed_under_load_fails_no_request(servers: Servers) -> None:
    """Chats, streams that have not begun, likelihoods; and the server comes back into service."""
    llm = backend(servers)
    gone, stays = servers.ports
    ids = llm.chat_tokenizer.encode("an answer")
    wanted = LogLikelihood(-sum(ids), len(ids))
    answers: list[str] = []

    async def chats(count: int) -> Counter[str]:
        async def one() -> str:
            answers.append((await llm.chat(Chat(ASK, max_tokens=4))).text)
            return answers[-1]

        return Counter(await asyncio.gather(*(one() for _ in range(count))))

    async def load() -> tuple[Counter[str], list[str], list[LogLikelihood]]:
        likelihoods = (llm.loglikelihood(ASK, "an answer") for _ in range(120))
        streams = (streamed(llm) for _ in range(40))
        _, *found = await asyncio.gather(
            kill(), chats(120), asyncio.gather(*streams), asyncio.gather(*likelihoods)
        )
        return tuple(found)  # type: ignore[return-value]

    async def kill() -> None:
        while answers.count(str(gone)) < 20 + 10:  # of the load, that is: in the middle of it
            await asyncio.sleep(SECONDS / 10)
        await asyncio.to_thread(servers.kill, gone)

    async def run() -> None:
        await llm.ready()
        assert await chats(40) == {str(gone): 20, str(stays): 20}
        answered, streams, likelihoods = await load()
        assert answered.total() == 120 and 10 <= answered[str(gone)] < 60
        assert len(streams) == 40 and likelihoods == [wanted] * 120
        assert await chats(20) == {str(stays): 20}  # nobody asks the dead one first
        await asyncio.to_thread(servers.start, gone)
        for _ in range(100):
            if str(gone) in await chats(4):
                break
            await asyncio.sleep(0.1)
        assert await chats(40) == {str(gone): 20, str(stays): 20}
        await llm.aclose()

    asyncio.run(run())


def test_one_that_hangs_costs_one_timeout(
    servers: Servers, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped, not dead: it accepts connections and never answers."""
    llm = backend(servers, timeout_seconds=1.0)
    hangs, stays = servers.ports

    async def run() -> None:
        await llm.ready()
        servers.processes[hangs].send_signal(signal.SIGSTOP)
        texts = [(await llm.chat(Chat(ASK, max_tokens=4))).text for _ in range(12)]
        assert set(texts) == {str(stays)}
        await llm.aclose()

    asyncio.run(asyncio.wait_for(run(), 15))
    assert capsys.readouterr().err.count(f"http://127.0.0.1:{hangs} does not answer") == 1
    servers.processes[hangs].send_signal(signal.SIGCONT)


def test_where_all_are_gone_the_error_names_them(servers: Servers) -> None:
    llm = backend(servers)

    async def run() -> None:
        await llm.ready()
        for port in servers.ports:
            servers.kill(port)
        with pytest.raises(LLMUnavailable, match="2 attempt") as caught:
            await llm.chat(Chat(ASK, max_tokens=4))
        assert all(str(port) in str(caught.value) for port in servers.ports)
        await llm.aclose()

    asyncio.run(run())
