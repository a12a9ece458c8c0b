"""Clients that go away while an LLM is at their answers: real gateway, real connections."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from memshare.pool.store import PoolStore
from tests.gateways import gateway
from tests.retrieving import until
from tests.stalling_llm import StallingLLM

KINDS = ("whole", "stream", "stream that has begun")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def ask(url: str, question: str, stream: bool, seconds: float) -> Any:
    """The reply; `httpx.ReadTimeout`, and the connection closed, if nothing came for so long."""
    body = {"messages": [{"role": "user", "content": question}], "stream": stream}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=seconds)


@pytest.mark.parametrize("kind", KINDS)
def test_the_llm_is_let_go_and_nothing_is_stored(tmp_path: Path, models: Path, kind: str) -> None:
    llm = StallingLLM(mute=kind == "stream")
    with (
        llm.running() as section,
        # With one place, the next chat tells that it is free.
        gateway(tmp_path, models, agent_llm=section, gateway={"max_chats": 1}) as url,
    ):
        with pytest.raises(httpx.ReadTimeout):
            ask(url, "who has gone", kind != "whole", 1.0)
        until(lambda: llm.left == 1, 10)
        assert llm.taken == 1 and not llm.go_on.is_set()
        llm.go_on.set()

        def answered() -> bool:
            reply = ask(url, "who has stayed", False, 60)
            assert reply.status_code in (200, 429)
            return bool(reply.status_code == 200)

        until(answered, 10)
        figures = httpx.get(f"{url}/metrics", timeout=30).text
        until(lambda: 'reason="stored"} 1.0' in httpx.get(f"{url}/metrics", timeout=30).text)
    status = 200 if kind == "stream that has begun" else 499  # a stream's status comes first
    where = 'method="POST",route="/v1/chat/completions"'
    count = {200: 2, 499: 1}[status]
    assert f'memshare_requests_total{{{where},status="{status}"}} {count}.0' in figures, figures
    lines = map(json.loads, (tmp_path / "gateway.log").read_text().splitlines())
    told = [line for line in lines if line.get("route") == "/v1/chat/completions"]
    assert [line["status"] for line in told if line["status"] != 429] == [status, 200]
    assert {line["level"] for line in told} == {"info"}
    with PoolStore.open(f"sqlite:///{tmp_path}/pool.db") as store:
        assert [memory.prompt for memory in store.iter("keep")] == ["who has stayed"]
        assert store.decisions("keep") == {"stored": 1}
