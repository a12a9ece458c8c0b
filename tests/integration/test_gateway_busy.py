"""A real gateway over an LLM that stalls: asked to stop meanwhile, and asked too much."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from memshare.pool.store import PoolStore
from tests.gateways import gateway, launch, wait_ready
from tests.loop import loop_config_file
from tests.retrieving import until
from tests.stalling_llm import StallingLLM

PLACES, CLIENTS = 4, 40
REFUSED_SECONDS = 5.0  # the slowest 429 of so many clients that come at once
CLOSED_SECONDS = 5.0  # from SIGTERM to the first connection that is refused


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def chat(url: str, question: str) -> tuple[httpx.Response, float]:
    """The reply, and the seconds that it took."""
    began = time.monotonic()
    body = {"messages": [{"role": "user", "content": question}]}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    return reply, time.monotonic() - began


def stream(url: str, question: str, first: Callable[[], None]) -> list[str]:
    """The events' data; ``first`` is called once one is there."""
    body = {"messages": [{"role": "user", "content": question}], "stream": True}
    events = []
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=120) as reply:
        assert reply.status_code == 200, reply.read()
        for line in reply.iter_lines():
            if line:
                events.append(line.removeprefix("data: "))
                first()
    return events


def refuses(url: str) -> bool:
    """Whether nobody listens there any more."""
    where = urlsplit(url)
    try:
        socket.create_connection((str(where.hostname), where.port or 0), 5).close()
    except ConnectionRefusedError:
        return True
    return False


def test_asked_to_stop_it_finishes_what_it_has_accepted(tmp_path: Path, models: Path) -> None:
    llm = StallingLLM()
    with (
        ThreadPoolExecutor(2) as threads,
        llm.running() as section,
        (tmp_path / "gateway.log").open("w") as log,
    ):
        config = loop_config_file(tmp_path, models, agent_llm=section)
        process = launch("serve/gateway.py", config, "--port", "0", log=log)
        try:
            url = wait_ready(process, tmp_path)
            heard: list[bool] = []
            whole = threads.submit(chat, url, "a chat in flight")
            parts = threads.submit(stream, url, "a stream in flight", lambda: heard.append(True))
            until(lambda: llm.taken == 2 and bool(heard))
            process.send_signal(signal.SIGTERM)
            until(lambda: refuses(url), CLOSED_SECONDS)
            time.sleep(0.5)
            assert process.poll() is None and not (whole.done() or parts.done())
            llm.go_on.set()
            reply, _ = whole.result()
            events = parts.result()
            assert process.wait(30) == 0
        finally:
            process.kill()
    text = (tmp_path / "gateway.log").read_text()
    assert "Traceback" not in text, text
    assert reply.status_code == 200 and reply.json()["memshare"]["write"] == "pending"
    assert reply.json()["choices"][0]["message"]["content"] == "to be"
    assert events[-1] == "[DONE]"
    said = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    assert "".join(said) == "to be"
    with PoolStore.open(f"sqlite:///{tmp_path}/pool.db") as store:
        kept = {(memory.prompt, memory.answer) for memory in store.iter("keep")}
    assert kept == {("a chat in flight", "to be"), ("a stream in flight", "to be")}


def check_refusal(reply: httpx.Response) -> None:
    assert reply.status_code == 429, reply.text
    assert int(reply.headers["Retry-After"]) > 0
    assert reply.json()["error"]["code"] == "overloaded"


def write(url: str, prompt: str) -> int:
    """Send it until it is taken, as good clients do; how often it was refused."""
    item = {"pool": "keep", "prompt": prompt, "answer": "yes"}
    for refusals in range(1000):
        reply = httpx.post(f"{url}/v1/memories", json={"items": [item]}, timeout=60)
        if reply.status_code == 201:
            return refusals
        check_refusal(reply)
        time.sleep(0.05)
    raise AssertionError("never taken")


def search(url: str) -> list[dict[str, Any]]:
    body = {"pool": "keep", "query": "client", "k": 100}
    reply = httpx.post(f"{url}/v1/memories/search", json=body, timeout=60)
    found: list[dict[str, Any]] = reply.raise_for_status().json()["memories"]
    return found


def test_overload_is_shed_at_once_and_leaves_no_trace(tmp_path: Path, models: Path) -> None:
    llm = StallingLLM()
    limits = {"max_chats": PLACES, "max_requests": PLACES}
    with (
        ThreadPoolExecutor(CLIENTS) as threads,
        llm.running() as section,
        gateway(tmp_path, models, agent_llm=section, gateway=limits) as url,
    ):
        asked = [threads.submit(chat, url, f"chat {number}") for number in range(CLIENTS)]
        until(lambda: sum(one.done() for one in asked) >= CLIENTS - PLACES)
        refused = [one.result() for one in asked if one.done()]
        assert len(refused) == CLIENTS - PLACES  # no admitted one is answered yet
        for reply, seconds in refused:
            check_refusal(reply)
            assert seconds < REFUSED_SECONDS, f"a refusal took {seconds:.1f} s"
        # All places for chats are taken, and memories are served; too many of those are shed too.
        assert write(url, "the first") == 0 and len(search(url)) == 1
        names = [f"client {number}" for number in range(CLIENTS)]
        with ThreadPoolExecutor(CLIENTS) as writers:
            assert sum(writers.map(lambda name: write(url, name), names)) > 0
        assert {memory["prompt"] for memory in search(url)} == {"the first", *names}
        llm.go_on.set()
        statuses = sorted(one.result()[0].status_code for one in asked)
        assert statuses == [200] * PLACES + [429] * (CLIENTS - PLACES)
        again = list(threads.map(lambda number: chat(url, f"again {number}")[0], range(PLACES)))
        assert [reply.status_code for reply in again] == [200] * PLACES
        figures = httpx.get(f"{url}/metrics", timeout=30).text
    assert 'memshare_active_requests{kind="chat"} 0.0' in figures, figures
