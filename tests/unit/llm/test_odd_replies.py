"""The vLLM backend against a server that refuses, changes or answers oddly."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from memshare.config import LLMConfig
from memshare.llm.base import Chat, ContextTooLong, LLMError, LLMUnavailable, LogLikelihood, Message
from memshare.llm.vllm import VLLMBackend
from tests.flaky import Flaky, reply

ASK: list[Message] = [{"role": "user", "content": "x"}]


@pytest.fixture
def flaky() -> Iterator[Flaky]:
    with Flaky() as made:
        yield made


def backend(flaky: Flaky, folder: Path, **settings: Any) -> VLLMBackend:
    config = LLMConfig(backend="vllm", url=flaky.url, retries=0, **settings)
    return VLLMBackend(str(folder), config, backoff_seconds=0.01)


def serve(flaky: Flaky, server: dict[str, Any]) -> None:
    """As vLLM does it: the card of ``server``, and -1 nat for every token of what fits it."""

    def behave(handler: BaseHTTPRequestHandler, number: int) -> None:
        if handler.path == "/v1/models":
            return reply(handler, 200, {"data": [server]})
        body = flaky.bodies[number - 1]
        if body["model"] != server["id"]:
            return reply(handler, 404, {"error": {"message": "no such model"}})
        if any(len(ids) >= server["max_model_len"] for ids in body["prompt"]):
            return reply(handler, 400, {"error": {"message": "too long"}})
        rows = [[None, *({str(i): {"logprob": -1.0}} for i in ids[1:])] for ids in body["prompt"]]
        choices = [{"index": i, "prompt_logprobs": row} for i, row in enumerate(rows)]
        return reply(handler, 200, {"choices": choices})

    flaky.behave = behave


def test_what_is_refused_takes_no_others_along(flaky: Flaky, lm_folder: Path) -> None:
    server = {"id": "alias", "root": str(lm_folder), "max_model_len": 300}
    serve(flaky, server)
    made = backend(flaky, lm_folder)
    asyncio.run(made.ready())
    server["max_model_len"] = 60  # started again with less, which nobody has told
    texts = ["y" * (100 if i == 5 else 1) for i in range(12)]

    async def run() -> list[LogLikelihood | BaseException]:
        asked = (made.loglikelihood(ASK, text) for text in texts)
        return await asyncio.gather(*asked, return_exceptions=True)

    found = asyncio.run(run())
    assert isinstance(found[5], LLMError) and "too long" in str(found[5])
    assert found[:5] + found[6:] == [LogLikelihood(-1.0, 1)] * 11


def test_a_server_started_again_is_asked_what_it_serves(flaky: Flaky, lm_folder: Path) -> None:
    server = {"id": "alias", "root": str(lm_folder), "max_model_len": 300}
    serve(flaky, server)
    made = backend(flaky, lm_folder)
    assert asyncio.run(made.loglikelihood(ASK, "y")) == LogLikelihood(-1.0, 1)
    server |= {"id": "another name", "max_model_len": 60}
    with pytest.raises(LLMUnavailable, match="no such model"):
        asyncio.run(made.loglikelihood(ASK, "y"))
    assert asyncio.run(made.loglikelihood(ASK, "y")) == LogLikelihood(-1.0, 1)
    assert made.context_length == 60
    with pytest.raises(ContextTooLong):
        asyncio.run(made.loglikelihood(ASK, "y" * 100))
    server["max_model_len"] = 300
    asked = len(flaky.bodies)
    assert asyncio.run(made.loglikelihood(ASK, "y")) == LogLikelihood(-1.0, 1)
    assert len(flaky.bodies) == asked + 1  # nothing failed: no reason to ask


def test_labels_without_a_usable_probability_are_no_grade(flaky: Flaky, lm_folder: Path) -> None:
    nan, inf = float("nan"), float("inf")
    made = backend(flaky, lm_folder)
    serve(flaky, {"id": "alias", "root": str(lm_folder), "max_model_len": 2000})
    asyncio.run(made.ready())

    def labels(*scores: Any) -> list[float]:
        def behave(handler: BaseHTTPRequestHandler, number: int) -> None:
            ids = flaky.bodies[number - 1].get("logprob_token_ids")
            if ids is None:
                return reply(handler, 200, {"data": [{"id": "alias", "root": str(lm_folder)}]})
            top = {f"token_id:{id}": score for id, score in zip(ids, scores, strict=True)}
            choice = {"logprobs": {"top_logprobs": [top]}}
            return reply(handler, 200, json.dumps({"choices": [choice]}).encode())

        flaky.behave = behave
        return asyncio.run(made.label_probabilities(ASK, ["0", "1"]))

    assert labels(-inf, -9999.0) == [0.0, 1.0]
    for scores in ((nan, -1.0), (-1.0, nan), (-inf, -inf), (inf, -1.0), ("NaN", -1.0), ("x", -1.0)):
        with pytest.raises(LLMError, match="unexpected reply"):
            labels(*scores)


@pytest.mark.parametrize(
    "models",
    [
        {"data": None},
        {"data": 5},
        {"data": [{"root": "FOLDER"}]},
        {"data": [{"id": "a", "root": "FOLDER", "max_model_len": "many"}]},
        {"data": [{"id": "a", "root": "FOLDER", "max_model_len": float("inf")}]},
        {"data": [{"id": "a", "root": "a" * 5000}]},
    ],
)
def test_a_list_of_models_of_another_form(
    flaky: Flaky, lm_folder: Path, models: dict[str, Any]
) -> None:
    text = json.dumps(models).replace("FOLDER", str(lm_folder))
    flaky.behave = lambda h, n: reply(h, 200, text.encode())
    with pytest.raises(LLMUnavailable):
        asyncio.run(backend(flaky, lm_folder).ready())


def test_numbers_of_another_form(flaky: Flaky, lm_folder: Path) -> None:
    server = {"id": "alias", "root": str(lm_folder), "max_model_len": 300}
    serve(flaky, server)
    made = backend(flaky, lm_folder)
    asyncio.run(made.ready())
    choice = {"message": {"content": "x"}, "finish_reason": "stop"}
    without = {"choices": [choice], "usage": {"prompt_tokens": None}}
    flaky.behave = lambda h, n: reply(h, 200, without)
    assert asyncio.run(made.chat(Chat(ASK, max_tokens=1))).text == "x"
    for count in ("abc", float("inf"), float("nan")):
        odd = json.dumps({"choices": [choice], "usage": {"prompt_tokens": count}}).encode()
        flaky.behave = lambda h, n, odd=odd: reply(h, 200, odd)
        with pytest.raises(LLMError, match="unexpected reply"):
            asyncio.run(made.chat(Chat(ASK, max_tokens=1)))
        serve(flaky, server)
        asyncio.run(made.ready())
