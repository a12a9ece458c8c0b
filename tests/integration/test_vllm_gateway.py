"""The gateway and the bootstrap against real vLLM."""

from __future__ import annotations

import concurrent.futures
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from memshare.cli import main
from memshare.pool.store import PoolStore
from memshare.records import NewMemory
from tests.gateways import gateway
from tests.integration.conftest import VLLMServer
from tests.integration.test_gateway import add
from tests.loop import loop_config_file

# The first of these tests waits for the server to start.
pytestmark = [pytest.mark.server, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def sections(vllm_server: VLLMServer) -> dict[str, Any]:
    llm = {
        "backend": "vllm",
        "model": vllm_server.model,
        "url": vllm_server.url,
        "server": {"python": str(vllm_server.llm.server.python)},
    }
    return {"agent_llm": llm, "scorer_llm": llm, "agent": {"max_tokens": 24}}


@pytest.fixture(scope="module")
def url(
    tmp_path_factory: pytest.TempPathFactory, models: Path, sections: dict[str, Any]
) -> Iterator[str]:
    with gateway(tmp_path_factory.mktemp("run"), models, **sections) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(question: str, **body: Any) -> dict[str, Any]:
    return {"model": "any", "messages": [{"role": "user", "content": question}], **body}


def test_reachable_llms_are_shown(url: str) -> None:
    state = httpx.get(f"{url}/readyz").json()
    assert state["llm"] == {"agent": "reachable", "scorer": "reachable"}


def test_shots_reach_the_llm_as_turns(
    url: str, client: openai.OpenAI, vllm_server: VLLMServer
) -> None:
    (id_,) = add(url, "what do red apples taste of")
    question = ask("what do red apples taste of", extra_body={"memory": {"shots": 1}})
    reply = client.chat.completions.create(**question)
    assert (reply.model_extra or {})["memshare"]["memories"] == [id_]
    by_hand = [
        {"role": "user", "content": "what do red apples taste of"},
        {"role": "assistant", "content": "of what do red apples taste of"},
        {"role": "user", "content": "what do red apples taste of"},
    ]
    served = httpx.get(f"{vllm_server.url}/v1/models").json()["data"][0]["id"]
    body = {"model": served, "messages": by_hand, "max_tokens": 24, "temperature": 0}
    direct = httpx.post(f"{vllm_server.url}/v1/chat/completions", json=body, timeout=120).json()
    assert reply.choices[0].message.content == direct["choices"][0]["message"]["content"]
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == direct["usage"]["prompt_tokens"]


def test_stream_says_the_same(url: str, client: openai.OpenAI) -> None:
    (id_,) = add(url, "stream of consciousness")
    question = ask("stream of consciousness", extra_body={"memory": {"shots": 1, "write": False}})
    whole = client.chat.completions.create(**question)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**question, **options))
    assert (chunks[0].model_extra or {})["memshare"]["memories"] == [id_]
    said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert said == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_unknown_fields_reach_the_llm(client: openai.OpenAI) -> None:
    off = {"memory": {"shots": 0, "write": False}}
    create = client.chat.completions.create
    two = create(**ask("hi", n=2, temperature=1.0, logprobs=True, extra_body=off))
    assert [choice.index for choice in two.choices] == [0, 1]
    assert two.choices[0].logprobs is not None and two.choices[0].logprobs.content
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
    form = {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema}}
    reply = create(**ask("hi", response_format=form, max_tokens=64, extra_body=off))
    if reply.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(reply.choices[0].message.content or "")["yes"], bool)


def test_tools_reach_the_llm_and_their_calls_the_client(url: str, client: openai.OpenAI) -> None:
    parameters = {
        "type": "object",
        "properties": {"where": {"type": "string", "enum": ["here", "there"]}},
        "required": ["where"],
    }
    tool = {"type": "function", "function": {"name": "look", "parameters": parameters}}
    create = client.chat.completions.create
    choice = {"type": "function", "function": {"name": "look"}}
    add(url, "where should I look")
    question = ask("where should I look", tools=[tool], tool_choice=choice, max_tokens=64)
    reply = create(**question)
    (call,) = reply.choices[0].message.tool_calls or ()
    assert call.type == "function" and call.function.name == "look"
    if reply.choices[0].finish_reason != "length":
        assert json.loads(call.function.arguments)["where"] in ("here", "there")
    note = (reply.model_extra or {})["memshare"]
    assert note["memories"] and (note["write"], note["reason"]) == ("off", "the answer calls tools")
    chunks = list(create(**question, stream=True))
    deltas = [c.choices[0].delta for c in chunks if c.choices]
    said = [t.function.arguments or "" for d in deltas for t in d.tool_calls or () if t.function]
    assert "".join(said) == call.function.arguments


def test_many_at_once_none_fails_and_each_pair_is_decided_once(url: str) -> None:
    def one(number: int) -> int:
        body = ask(f"question number {number}", memory={"pool": "strict"})
        return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300).status_code

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert set(pool.map(one, range(32))) == {200}
    deadline = time.monotonic() + 120
    decided = 0.0
    while decided < 32 and time.monotonic() < deadline:
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        mine = [line for line in lines if 'memshare_decisions_total{pool="strict"' in line]
        decided = sum(float(line.split()[-1]) for line in mine)
        time.sleep(0.2)
    assert decided == 32


def test_bootstrap(
    tmp_path: Path,
    models: Path,
    sections: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    section = {"questions": 16, "temperature": 1.0}
    config = loop_config_file(tmp_path, models, bootstrap=section, **sections)
    with PoolStore.open(f"sqlite:///{tmp_path / 'pool.db'}") as store:
        store.create_pool("keep", threshold=0)
        seeds = [f"What does the {animal} eat in winter?" for animal in ("fox", "owl", "hare")]
        store.append([NewMemory("keep", seed, "Whatever it finds.") for seed in seeds])
    assert main(["bootstrap", "--config", str(config), "--pool", "keep"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["seeds"] == 3
    assert report["questions"] == sum(report["counts"].values()) == 16
    with PoolStore.open(f"sqlite:///{tmp_path / 'pool.db'}") as store:
        assert store.stats("keep").memories == 3 + report["stored"]
        prompts = [memory.prompt for memory in store.iter("keep")]
    assert len(prompts) == len(set(prompts))  # repeated questions never get in
