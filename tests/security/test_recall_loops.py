"""Memories that come back as answers: what was shown adds nothing when it is said again.

Through the real gateway as a process. Its LLM answers whatever the last example answered, as an
agent that copies would: an OpenAI-compatible server of this test, so that the copying is certain.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.gateways import gateway

POEM = "There once was a teapot of tin that hummed while the kettle came in and sang by the fire"
COPIES = 3


class Parrot(BaseHTTPRequestHandler):
    """Says what the last assistant turn of the prompt says, if there is one."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = [turn["content"] for turn in body["messages"] if turn["role"] == "assistant"]
        text = said[-1] if said else "I know nothing of that"
        message = {"role": "assistant", "content": text}
        reply = {
            "id": "1", "object": "chat.completion", "created": 1, "model": "parrot",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }  # fmt: skip
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@contextmanager
def parrot() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Parrot)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def memories(http: httpx.Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = http.get("/v1/memories?pool=keep&limit=1000").json()["memories"]
    return found


def decided(http: httpx.Client, count: int) -> None:
    """Wait until ``count`` pairs have their decisions."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        lines = http.get("/metrics").text.splitlines()
        made = [line for line in lines if line.startswith("memshare_decisions_total{")]
        if sum(float(line.rsplit(" ", 1)[1]) for line in made) >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"fewer than {count} decisions: {made}")


def test_saying_again_what_was_shown_adds_nothing(tmp_path: Path, models: Path) -> None:
    pools = {"keep": {"threshold": 0, "max_copies": COPIES}}
    with (
        parrot() as url,
        gateway(
            tmp_path,
            models,
            pools=pools,
            retriever={"pools": ["keep"]},
            agent_llm={"backend": "openai", "url": url, "model": "parrot"},
        ) as base,
        httpx.Client(base_url=base, timeout=60) as http,
    ):
        first = {"pool": "keep", "prompt": "a poem of a teapot", "answer": POEM}
        added = http.post("/v1/memories", json={"items": [first]}).json()["results"][0]
        assert added["status"] == "stored"

        # 1. What a search returned, written again: it is there already.
        search = {"pool": "keep", "query": "teapot", "k": 5}
        for _ in range(3):
            shown = http.post("/v1/memories/search", json=search).json()["memories"]
            again = http.post("/v1/memories", json={"items": shown}).json()["results"]
            assert [(r["status"], r["id"]) for r in again] == [("duplicate", added["id"])]
        assert len(memories(http)) == 1

        # 2. An agent that repeats what it was shown, to other questions: a few times and no more,
        # also where the copies are what it is shown by then.
        for number in range(4 * COPIES):
            asked = [{"role": "user", "content": f"a poem of a teapot, number {number}"}]
            body = {"messages": asked, "memory": {"pool": "keep", "shots": 2}}
            reply = http.post("/v1/chat/completions", json=body).json()
            assert reply["choices"][0]["message"]["content"] == POEM
            assert reply["memshare"]["memories"] and reply["memshare"]["write"] == "pending"
            decided(http, number + 1)
        kept = memories(http)
        assert len(kept) == 1 + COPIES and {memory["answer"] for memory in kept} == {POEM}

        # 3. What is deleted doesn't come back by way of those who saw it before.
        for memory in kept:
            assert http.delete(f"/v1/memories/{memory['id']}").status_code == 200
        assert memories(http) == []
