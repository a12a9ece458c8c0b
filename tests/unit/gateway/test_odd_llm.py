"""Chats whose LLM says what no model of ours does: odd text, odd numbers, odd forms."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.flaky import Flaky, reply
from tests.unit.gateway.conftest import running

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def llm() -> Iterator[Flaky]:
    with Flaky() as made:
        yield made


@pytest.fixture(scope="module")
def gateway(
    tmp_path_factory: pytest.TempPathFactory, models: Path, llm: Flaky
) -> Iterator[TestClient]:
    agent = {"backend": "openai", "model": "m", "url": llm.url, "retries": 0}
    with running(tmp_path_factory.mktemp("run"), models, agent_llm=agent) as client:
        yield client


def ask(gateway: TestClient, llm: Flaky, said: dict[str, Any]) -> Any:
    llm.behave = lambda h, n: reply(h, 200, json.dumps(said).encode())
    return gateway.post(CHAT, json={"messages": [{"role": "user", "content": "why?"}]})


def stream(gateway: TestClient, llm: Flaky, *said: Any) -> tuple[int, list[Any]]:
    """The status, and what came: events, and ``[DONE]``; ``said`` likewise, or as it stands."""

    def behave(handler: BaseHTTPRequestHandler, _: int) -> None:
        texts = [event if isinstance(event, str) else json.dumps(event) for event in said]
        reply(handler, 200, "".join(f"data: {text}\n\n" for text in texts).encode())

    llm.behave = behave
    messages = [{"role": "user", "content": "why?"}]
    got = gateway.post(CHAT, json={"messages": messages, "stream": True})
    if got.status_code != 200:
        return got.status_code, [got.json()]
    lines = [line.removeprefix("data: ") for line in got.text.split("\n\n") if line]
    return 200, [line if line == "[DONE]" else json.loads(line) for line in lines]


def answer(content: Any, **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], **more}


def piece(content: Any, finish: str | None = None, **more: Any) -> dict[str, Any]:
    delta = {"content": content}
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more}


def test_half_a_character_reaches_the_client(gateway: TestClient, llm: Flaky) -> None:
    """As servers that count UTF-16 cut an emoji: between two pieces, or at the end."""
    whole = ask(gateway, llm, answer("half \ud83d"))
    assert whole.status_code == 200
    assert whole.json()["choices"][0]["message"]["content"] == "half \ud83d"
    pieces = [piece("\ud83d"), piece("\ude00"), piece("", "stop")]
    status, events = stream(gateway, llm, *pieces, "[DONE]")
    assert status == 200 and events[-1] == "[DONE]"
    assert [event["choices"] for event in events[:-1]] == [event["choices"] for event in pieces]
    refused = stream(gateway, llm, {"error": {"message": "cut \ud83d"}})
    assert refused[0] == 400 and refused[1][0]["error"]["message"].endswith("cut \ud83d")


def test_no_number_of_the_llm_breaks_the_reply(gateway: TestClient, llm: Flaky) -> None:
    """What JSON has no number for is null, as JavaScript writes it."""
    odd = {"logprobs": [float("nan"), {"x": float("-inf")}, 0.5], "kept": [1, None, 1e-7, "é"]}
    whole = ask(gateway, llm, answer("x", **odd))
    expected = {"logprobs": [None, {"x": None}, 0.5], "kept": [1, None, 1e-7, "é"]}
    assert whole.status_code == 200
    assert {name: whole.json()[name] for name in expected} == expected
    status, (first, *_, last) = stream(gateway, llm, piece("x", "stop", **odd), "[DONE]")
    assert status == 200 and last == "[DONE]"
    assert {name: first[name] for name in expected} == expected


def test_an_answer_in_parts_is_read_as_its_text(gateway: TestClient, llm: Flaky) -> None:
    """As reasoning models have it that show their thoughts as parts of the content."""
    thought = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
    parts = [thought, {"type": "text", "text": "By an "}, {"type": "text", "text": "answer."}]
    whole = ask(gateway, llm, answer(parts))
    assert whole.status_code == 200 and whole.json()["memshare"]["write"] == "pending"
    assert whole.json()["choices"][0]["message"]["content"] == parts
    pieces = [piece([thought]), piece(parts[1:2]), piece("streamed"), piece([], "stop")]
    status, events = stream(gateway, llm, *pieces, "[DONE]")
    assert status == 200 and events[-1] == "[DONE]"
    assert [event["choices"] for event in events[:-1]] == [event["choices"] for event in pieces]
    wanted = {"By an answer.", "By an streamed"}
    deadline = time.monotonic() + 20
    while not wanted <= (found := stored(gateway)):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


@pytest.mark.parametrize("event", ["5", "null", '["x"]', '"error"', "{bad", "[" * 5000])
def test_an_event_that_is_no_object_is_told_as_such(
    gateway: TestClient, llm: Flaky, event: str
) -> None:
    for before in ([], [piece("x")]):
        status, (*_, last) = stream(gateway, llm, *before, event, "[DONE]")
        assert status == (200 if before else 400)
        assert last["error"]["code"] == "llm_refused"
        assert "streamed no JSON object" in last["error"]["message"]


def test_a_stream_may_lack_what_readers_do_without(gateway: TestClient, llm: Flaky) -> None:
    ends = [piece("x", error=None), piece("", "stop", error=None), "[DONE]"]
    assert stream(gateway, llm, *ends)[1][-1] == "[DONE]"
    text = "".join(f"data: {json.dumps(event)}\n\n" for event in ends[:2])
    llm.behave = lambda h, n: reply(h, 200, f"{text}data: [DONE]".encode())  # no line's end
    messages = [{"role": "user", "content": "why?"}]
    got = gateway.post(CHAT, json={"messages": messages, "stream": True})
    assert got.text.endswith("data: [DONE]\n\n")


def stored(gateway: TestClient) -> set[str]:
    found = gateway.get("/v1/memories", params={"pool": "keep"}).json()["memories"]
    return {memory["answer"] for memory in found}
