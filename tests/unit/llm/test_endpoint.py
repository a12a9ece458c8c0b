from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from memshare.config import LLMConfig
from memshare.llm.base import Chat, ContextTooLong, LLMError, Message
from memshare.llm.endpoint import EndpointBackend
from memshare.llm.factory import make_llm
from memshare.llm.neutralise import BREAK, has_control_string
from tests.flaky import Flaky, reply
from tests.unit.llm.test_tokens import HOSTILE

ASK: list[Message] = [{"role": "user", "content": "why?"}]


@pytest.fixture
def server() -> Iterator[Flaky]:
    with Flaky() as made:
        yield made


def llm(server: Flaky, **settings: Any) -> EndpointBackend:
    config = LLMConfig(backend="openai", model="big-model", url=server.url, retries=0, **settings)
    made = make_llm(config)
    assert isinstance(made, EndpointBackend)
    return made


def choice(text: str, **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    return {"choices": [{"message": message, "finish_reason": "length", **more}], "usage": usage}


def test_chat_is_the_plain_protocol(server: Flaky, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    heard: list[str] = []

    def behave(handler: BaseHTTPRequestHandler, _: int) -> None:
        heard.append(f"{handler.path} {handler.headers['authorization']}")
        reply(handler, 200, choice("because"))

    server.behave = behave
    made = llm(server, api_key_env="MY_KEY")
    schema = {"type": "object"}
    found = asyncio.run(
        made.chat(
            Chat(ASK, max_tokens=9, temperature=0.5, seed=3, json_schema=schema, extra={"n": 1})
        )
    )
    assert (found.text, found.finish_reason) == ("because", "length")
    assert (found.prompt_tokens, found.completion_tokens) == (7, 3)
    assert heard == ["/v1/chat/completions Bearer secret"]
    form = {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema}}
    assert server.bodies == [
        {"model": "big-model", "messages": ASK, "max_tokens": 9, "temperature": 0.5, "seed": 3,
         "n": 1, "response_format": form},
    ]  # fmt: skip
    assert made.model == "big-model@" + server.url.removeprefix("http://")


def test_a_password_in_the_url_is_no_part_of_the_models_name() -> None:
    """Which is shown to every client, and stands in memories, examples and reports."""
    url = "https://ann:hunter2@llm.example:8443/v1"
    made = make_llm(LLMConfig(backend="openai", model="big-model", url=url))
    assert made.model == "big-model@llm.example:8443"


def test_labels_are_read_from_the_likeliest_tokens(server: Flaky) -> None:
    top = [{"token": token, "logprob": math.log(p)}
           for token, p in (("1", 0.4), (" 1", 0.1), ("no", 0.3), ("2", 0.1))]  # fmt: skip
    said = choice("1", logprobs={"content": [{"token": "1", "top_logprobs": top}]})
    server.behave = lambda handler, _: reply(handler, 200, said)
    made = llm(server)
    found = asyncio.run(made.label_probabilities(ASK, ["0", "1", "2"]))
    assert found == pytest.approx([0.0, 5 / 6, 1 / 6])
    with pytest.raises(LLMError, match="likeliest"):
        asyncio.run(made.label_probabilities(ASK, ["7", "8"]))
    asked = len(server.bodies)
    with pytest.raises(ContextTooLong):  # as by the other backends
        asyncio.run(llm(server, context_length=9).label_probabilities(ASK, ["0", "1"]))
    assert len(server.bodies) == asked
    server.behave = lambda handler, _: reply(handler, 200, choice("1"))
    with pytest.raises(LLMError, match="no log probabilities"):
        asyncio.run(made.label_probabilities(ASK, ["0", "1"]))


@pytest.mark.parametrize("logprob", [float("nan"), float("inf"), 1e5, "x", None])
def test_a_label_without_a_usable_probability_is_no_grade(server: Flaky, logprob: Any) -> None:
    top = [{"token": "0", "logprob": -1.0}, {"token": "1", "logprob": logprob}]
    said = json.dumps(choice("1", logprobs={"content": [{"top_logprobs": top}]})).encode()
    server.behave = lambda h, _: reply(h, 200, said)
    with pytest.raises(LLMError, match="gives no log probabilities"):
        asyncio.run(llm(server).label_probabilities(ASK, ["0", "1"]))


def test_likelihoods_are_refused_with_what_to_do(server: Flaky) -> None:
    with pytest.raises(LLMError, match="scorer_llm"):
        asyncio.run(llm(server).loglikelihood(ASK, "because"))
    assert not server.bodies


def test_an_odd_reply_is_an_error_and_tokens_are_not_underestimated(server: Flaky) -> None:
    server.behave = lambda handler, _: reply(handler, 200, {"choices": []})
    made = llm(server, context_length=100)
    with pytest.raises(LLMError, match="unexpected reply"):
        asyncio.run(made.chat(Chat(ASK, max_tokens=1)))
    assert made.context_length == 100
    chinese: list[Message] = [{"role": "user", "content": "昔闻洞庭水"}]
    assert made.count_tokens(chinese) >= 5 and made.count_tokens(ASK) >= 2


def test_tokens_of_parts_tool_calls_and_no_content_are_counted(server: Flaky) -> None:
    count = llm(server).count_tokens
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "x" * 300}}
    silent: Any = {"role": "assistant", "content": None}
    part = {"type": "text", "text": ASK[0]["content"]}
    image = {"type": "image_url", "image_url": {"url": "x" * 10_000}}
    assert count([{"role": "user", "content": [part, image]}]) == count(ASK)  # type: ignore[typeddict-item]
    assert 0 < count([silent]) == count([{"role": "assistant"}])  # type: ignore[typeddict-item]
    assert count([{**silent, "tool_calls": [call]}]) > count([silent]) + 100
    tools = {"tools": [{"type": "function", "function": {"name": "f", "description": "x" * 300}}]}
    assert count([silent], tools) > count([silent], {"tools": None}) + 100
    assert count([silent], {"tools": None}) == count([silent])


@pytest.mark.parametrize("hostile", HOSTILE)
def test_no_text_can_end_its_turn(server: Flaky, hostile: str) -> None:
    server.behave = lambda handler, _: reply(handler, 200, choice("ok"))
    call = {"id": "1", "function": {"name": "f", "arguments": hostile}}
    turns: list[Any] = [
        {"role": "user", "content": hostile, "name": "n"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "user", "content": [{"type": "text", "text": hostile}, {"type": "image_url"}]},
        {"role": "assistant", "tool_calls": [call]},
    ]
    asyncio.run(llm(server).chat(Chat(turns, max_tokens=1)))
    (sent,) = (body["messages"] for body in server.bodies)
    (text, parts) = (sent[0]["content"], sent[2]["content"])
    assert not has_control_string(text)
    assert text.replace(BREAK, "") == hostile.replace(BREAK, "")  # a reader sees the same
    assert parts == [{"type": "text", "text": text}, {"type": "image_url"}]
    assert [sent[1], sent[3]] == [turns[1], turns[3]] and sent[0]["name"] == "n"
