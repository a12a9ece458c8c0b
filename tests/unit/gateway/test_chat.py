"""Chat completions with memory, on real parts in one process."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import Request
from fastapi.testclient import TestClient

from memshare.gateway import stream
from memshare.pocket.tokenizer import CHAT_TEMPLATE
from memshare.records import Pair
from tests.unit.gateway.conftest import running

STOPS = list("etaoinrs ")  # a random model rarely ends by itself; these letters end its answer


def chat(client: TestClient, question: str, **body: Any) -> Any:
    messages = [{"role": "user", "content": question}]
    return client.post("/v1/chat/completions", json={"messages": messages, **body})


def finished(client: TestClient, question: str, **body: Any) -> dict[str, Any]:
    """A reply that was not cut off, which a random model gives for some seed."""
    for seed in range(200):
        reply = chat(client, question, seed=seed, temperature=1.0, stop=STOPS, **body).json()
        choice = reply["choices"][0]
        if choice["finish_reason"] == "stop" and choice["message"]["content"].strip():
            found: dict[str, Any] = reply
            return found
    raise AssertionError("no seed made the model stop")


def events(client: TestClient, question: str, **body: Any) -> list[dict[str, Any]]:
    body = {"messages": [{"role": "user", "content": question}], "stream": True, **body}
    with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        assert reply.status_code == 200
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def fill(client: TestClient, *prompts: str) -> list[str]:
    items = [{"pool": "keep", "prompt": prompt, "answer": "an answer"} for prompt in prompts]
    results = client.post("/v1/memories", json={"items": items}).json()["results"]
    return [result["id"] for result in results]


def until(client: TestClient, wanted: dict[str, int]) -> None:
    """Wait for the decisions that the background makes."""
    deadline = time.monotonic() + 20
    text = ""
    while time.monotonic() < deadline:
        text = client.get("/metrics").text
        if all(f'reason="{r}"}} {n}.0' in text for r, n in wanted.items()):
            return
        time.sleep(0.05)
    raise AssertionError(f"{wanted} not reached: {text}")


def test_answer_names_generation_and_memories(client: TestClient) -> None:
    ids = fill(client, "red apples", "red pears", "blue plums")
    reply = chat(client, "red apples").json()
    assert reply["object"] == "chat.completion"
    assert reply["choices"][0]["message"]["role"] == "assistant"
    assert reply["memshare"]["generation"] == 0
    assert reply["memshare"]["memories"] == ids[:2]  # agent.shots is 2; best first
    bare = chat(client, "red apples", memory={"shots": 0}).json()
    assert (bare["memshare"]["generation"], bare["memshare"]["memories"]) == (None, [])
    assert bare["usage"]["prompt_tokens"] < reply["usage"]["prompt_tokens"]


def test_empty_pool_answers_zero_shot(client: TestClient) -> None:
    reply = chat(client, "anything", memory={"pool": "strict"}).json()
    assert reply["memshare"]["memories"] == []
    assert reply["choices"][0]["message"]["content"]


def test_stream_says_the_same_as_the_whole_answer(client: TestClient) -> None:
    fill(client, "green grapes")
    whole = chat(client, "green grapes", memory={"write": False}).json()
    options = {"memory": {"write": False}, "stream_options": {"include_usage": True}}
    chunks = events(client, "green grapes", **options)
    assert chunks[0]["memshare"] == whole["memshare"]
    assert all("memshare" not in chunk for chunk in chunks[1:])
    said = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])
    assert said == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["usage"] == whole["usage"]
    assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]][-1] == "length"


def test_bare_question_and_answer_are_stored_behind_the_answer(
    tmp_path: Path, models: Path
) -> None:
    with running(tmp_path, models) as client:
        fill(client, "an example")
        reply = finished(client, "What now?")
        assert reply["memshare"]["write"] == "pending"
        until(client, {"stored": 1})
        memories = client.get("/v1/memories?pool=keep").json()["memories"]
        (memory,) = [memory for memory in memories if memory["prompt"] == "What now?"]
        assert memory["answer"] == reply["choices"][0]["message"]["content"].strip()
        assert (memory["agent"], memory["model"]) == ("local", reply["model"])
        assert 0 < memory["score"] < 100
        shown = chat(client, "What now?").json()["memshare"]["memories"]
        assert shown[0] == memory["id"]  # searchable: the loop is closed


def test_streamed_answer_is_stored_too(tmp_path: Path, models: Path) -> None:
    with running(tmp_path, models) as client:
        reply = finished(client, "What now?", memory={"write": False})
        assert reply["memshare"]["write"] == "off"
        for seed in range(200):
            options = {"temperature": 1.0, "stop": STOPS, "seed": seed}
            chunks = events(client, "What now?", **options)
            said = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
            if chunks[-1]["choices"][0]["finish_reason"] == "stop" and said.strip():
                break
        until(client, {"stored": 1})
        (memory,) = client.get("/v1/memories?pool=keep").json()["memories"]
        assert (memory["prompt"], memory["answer"]) == ("What now?", said.strip())


def test_what_is_not_stored_and_why(tmp_path: Path, models: Path) -> None:
    with running(tmp_path, models) as client:
        assert chat(client, "q").json()["choices"][0]["finish_reason"] == "length"
        finished(client, "q", memory={"pool": "strict"})
        until(client, {"cut off by length": 1, "below threshold": 1})
        note = chat(client, "q", memory={"write": False}).json()["memshare"]
        assert (note["write"], note["reason"]) == ("off", "not asked for")
        blank = chat(client, "  ").json()["memshare"]
        assert blank["reason"] == "the question is empty" and blank["memories"] == []
    with running(tmp_path, models) as client:
        for pool in ("keep", "strict"):
            assert client.get(f"/v1/memories?pool={pool}").json()["memories"] == []


def test_several_pools_need_a_name_unless_memory_is_off(tmp_path: Path, models: Path) -> None:
    with running(tmp_path, models, gateway={"default_pool": None}) as client:
        refused = chat(client, "q")
        assert refused.status_code == 422
        assert refused.json()["error"]["param"] == "memory.pool"
        assert chat(client, "q", memory={"pool": "keep"}).status_code == 200
        assert chat(client, "q", memory={"shots": 0, "write": False}).status_code == 200


def test_llm_away_is_503_while_memories_stay(tmp_path: Path, models: Path) -> None:
    away = {"backend": "vllm", "url": "http://127.0.0.1:9", "retries": 0}  # nobody listens there
    with running(tmp_path, models, agent_llm=away) as client:
        state = client.get("/readyz").json()
        assert state["ready"] and state["llm"]["agent"].startswith("unreachable")
        for stream in (False, True):
            reply = chat(client, "q", stream=stream)
            assert reply.status_code == 503
            assert int(reply.headers["retry-after"]) > 0
            error = reply.json()["error"]
            assert error["code"] == "llm_unavailable"
            assert "127.0.0.1:9" in error["message"]
        (id_,) = fill(client, "still here")
        search = {"pool": "keep", "query": "still here", "k": 1}
        (memory,) = client.post("/v1/memories/search", json=search).json()["memories"]
        assert memory["id"] == id_


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({}, 422, "invalid_request"),
        ({"messages": []}, 422, "invalid_request"),
        ({"messages": "hi"}, 422, "invalid_request"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, 422, "invalid_request"),
        ({"messages": [{"role": "user", "content": 5}]}, 422, "invalid_request"),
        ({"messages": [{"role": "system", "content": "hi"}]}, 422, "no_question"),
        ({"memory": {"pool": "nowhere"}}, 404, "unknown_pool"),
        ({"memory": {"shots": -1}}, 422, "invalid_request"),
        ({"memory": {"shots": 65}}, 422, "invalid_request"),
        ({"memory": {"shots": "2"}}, 422, "invalid_request"),
        ({"memory": {"wirte": False}}, 422, "invalid_request"),
        ({"max_tokens": 0}, 422, "invalid_request"),
        ({"max_tokens": 10**6}, 400, "llm_refused"),
        ({"temperature": "hot"}, 422, "invalid_request"),
        ({"top_p": {}}, 422, "invalid_request"),
        ({"n": "two"}, 422, "invalid_request"),
        ({"n": 2}, 400, "llm_refused"),
        ({"stop": [1]}, 422, "invalid_request"),
        ({"tools": [{"type": "function"}]}, 400, "llm_refused"),
        ({"stream_options": "x", "stream": True}, 422, "invalid_request"),
        ({"messages": [{"role": "user", "content": "long " * 2000}]}, 400, "llm_refused"),
    ],
)
def test_bad_chats(client: TestClient, body: dict[str, Any], status: int, code: str) -> None:
    full = {"messages": [{"role": "user", "content": "hi"}], **body} if body else body
    reply = client.post("/v1/chat/completions", json=full)
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["code"] == code


def test_content_parts_and_tool_turns_under_the_pocket_template(
    tmp_path: Path, models: Path
) -> None:
    """It concatenates strings, so anything else in it is a TypeError."""
    from transformers import AutoTokenizer

    from tests.tiny_lm import tiny_lm

    lm = tiny_lm(tmp_path / "lm")
    tokenizer = AutoTokenizer.from_pretrained(str(lm))
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(lm)
    llm = {"backend": "transformers", "model": str(lm), "device": "cpu"}
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    question = {"role": "user", "content": [{"type": "text", "text": "red apples"}]}
    turns = [
        question,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "three", "tool_call_id": "1"},
    ]
    with running(tmp_path / "run", models, agent_llm=llm) as client:
        ids = fill(client, "red apples")
        for messages in ([question], turns):
            reply = client.post("/v1/chat/completions", json={"messages": messages})
            assert reply.status_code == 200, reply.text
            assert reply.json()["memshare"]["memories"] == ids
        image = {"type": "image_url", "image_url": {"url": "data:"}}
        bad = {"role": "user", "content": [*question["content"], image]}
        reply = client.post("/v1/chat/completions", json={"messages": [bad]})
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "llm_refused")


def test_shots_make_room_for_the_requests_tools(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[Any] = []
    fill(client, "red pears")
    app: Any = client.app
    llm = app.state.gateway.shared.agent.llm
    monkeypatch.setattr(llm, "count_tokens", lambda _, extra: counted.append(extra) or 1)
    tools = [{"type": "function", "function": {"name": "look"}}]
    assert chat(client, "red pears", tools=tools).status_code == 400  # the LLM here takes none
    assert counted == [{"tools": tools}]


@pytest.mark.parametrize("together", [False, True])
def test_a_stream_is_queued_before_its_end_is_sent(together: bool) -> None:
    """Whoever has the last chunk may go away, and the gateway may be killed then."""
    put: list[Pair] = []

    class Queue:
        async def put(self, pairs: list[Pair]) -> None:
            put.extend(pairs)

    def chunk(text: str, finish: str | None = None) -> dict[str, Any]:
        delta = {"content": text} if text else {}
        return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}

    async def chunks() -> Any:
        yield chunk("why ")
        assert not put  # no token waits for the queue
        if not together:
            yield chunk("not")
            assert not put
        yield chunk("not" if together else "", "stop")

    async def inside() -> None:
        gateway: Any = SimpleNamespace(
            shared=SimpleNamespace(stage=lambda name: nullcontext()), queue=Queue()
        )
        client = Request({"type": "http"}, receive=asyncio.Event().wait)  # stays
        reply = await stream.events(gateway, client, chunks(), {}, Pair("keep", "q", ""), [])
        body: Any = reply.body_iterator
        async for event in body:
            if b'"stop"' in event:
                break
        await body.aclose()
        assert [(pair.answer, pair.finish_reason) for pair in put] == [("why not", "stop")]

    asyncio.run(inside())
