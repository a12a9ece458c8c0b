"""Two real vLLM replicas, one killed under load: none is lost, and it serves again when it is back.

What stands before replicas is tested more closely, and faster, in test_replicas.py.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from memshare.config import LLMConfig
from memshare.llm.base import Chat, Completion, LogLikelihood
from memshare.llm.prompts import few_shot
from memshare.llm.replicas import LONGEST_REST_SECONDS
from memshare.llm.vllm import VLLMBackend
from tests.integration.conftest import START_SECONDS, VLLMServer, serve_llm
from tests.postgres import free_port

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(2 * START_SECONDS)]
MANY = 120
ANSWER = "by the sea, where it rains"


@pytest.fixture
def second(vllm_server: VLLMServer, tmp_path: Path) -> Iterator[tuple[LLMConfig, str, int]]:
    """The session's server and one more: a client's configuration, its URL and its process."""
    url = f"http://127.0.0.1:{free_port()}"
    llm = vllm_server.llm.model_copy(update={"url": (vllm_server.url, url)})
    with serve_llm(llm, tmp_path) as parent:
        (server,) = psutil.Process(parent).children()
        yield llm, url, server.pid


def answered(url: str) -> int:
    """How many requests a server has answered since it started."""
    told = httpx.get(f"{url}/metrics").raise_for_status().text
    counts = re.findall(r"^vllm:request_success_total{.*} ([0-9.e+]+)$", told, re.MULTILINE)
    assert counts, told
    return int(sum(map(float, counts)))


def healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def test_one_killed_under_load_loses_nothing_and_comes_back(
    second: tuple[LLMConfig, str, int],
    vllm_server: VLLMServer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, url, pid = second
    # No second try at one server: whatever is saved is saved by the other.
    llm = VLLMBackend(config.model, config.model_copy(update={"retries": 0}))
    questions = [few_shot("", [], f"question {i} about the sea") for i in range(MANY)]
    chats: list[Completion] = []

    async def chat(number: int) -> None:
        chats.append(await llm.chat(Chat(questions[number], max_tokens=48)))

    async def kill() -> None:
        while len(chats) < MANY // 4 or answered(url) < 10:
            await asyncio.sleep(0.02)
        os.kill(pid, signal.SIGKILL)

    async def load() -> list[LogLikelihood]:
        measured = asyncio.gather(*(llm.loglikelihood(q, ANSWER) for q in questions))
        await asyncio.gather(kill(), *(chat(i) for i in range(MANY)))
        return await measured

    async def run() -> None:
        await llm.ready()
        measured = await load()
        assert len(chats) == MANY and all(one.completion_tokens for one in chats)
        assert f"LLM server {url} does not answer" in capsys.readouterr().err
        for _ in range(int(START_SECONDS)):  # serve/llm.py starts it again
            if healthy(url):
                break
            await asyncio.sleep(1.0)
        assert answered(url) == 0
        deadline = time.monotonic() + 2 * LONGEST_REST_SECONDS
        told = ""
        while f"LLM server {url} answers again" not in told:  # one chat after its rest tries it
            assert time.monotonic() < deadline
            await chat(0)
            told += capsys.readouterr().err
            await asyncio.sleep(0.5)
        before = answered(url)
        for number in range(10):
            await chat(number)
        assert answered(url) - before >= 4  # in turns; a server counts a moment later
        # What was measured while one died is what the one that never did measures.
        alone = VLLMBackend(config.model, vllm_server.llm)
        again = await asyncio.gather(*(alone.loglikelihood(q, ANSWER) for q in questions))
        for ours, theirs in zip(measured, again, strict=True):
            assert ours.tokens == theirs.tokens
            assert ours.mean == pytest.approx(theirs.mean, abs=1e-2)
        await llm.aclose()
        await alone.aclose()

    asyncio.run(run())
