"""The transport against a real local server that misbehaves on request."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from memshare.config import LLMConfig
from memshare.llm.base import Chat, LLMError, LLMUnavailable, LogLikelihood
from memshare.llm.transport import Transport
from memshare.llm.vllm import VLLMBackend
from tests.flaky import Flaky, reply


@pytest.fixture
def flaky() -> Iterator[Flaky]:
    with Flaky() as made:
        yield made


def _transport(url: str, **kwargs: Any) -> Transport:
    settings = {"timeout": 5.0, "retries": 3, "concurrency": 4, "backoff": 0.01} | kwargs
    return Transport(url, "the-model", **settings)


@pytest.mark.parametrize("status", [429, 500, 503, 408])
def test_passing_failures_are_retried(flaky: Flaky, status: int) -> None:
    flaky.behave = lambda h, n: reply(h, 200 if n == 3 else status, {"n": n})
    assert asyncio.run(_transport(flaky.url).post("/x", {"a": 1})) == {"n": 3}
    assert flaky.bodies == [{"a": 1}] * 3


def test_retry_after_is_obeyed(flaky: Flaky) -> None:
    flaky.behave = lambda h, n: (
        reply(h, 200, {}) if n == 2 else reply(h, 429, {}, retry_after="0.6")
    )
    asyncio.run(_transport(flaky.url).get("/x"))
    assert flaky.times[1] - flaky.times[0] >= 0.6


@pytest.mark.parametrize(
    "asked",
    [
        "soon",
        "-3",
        "nan",
        "Mon, 99999999999999999999 Jan 2020 00:00:00 GMT",
        "Mon, 01 Jan 99999 00:00:00 GMT",
    ],
)
def test_a_retry_after_that_names_no_time(flaky: Flaky, asked: str) -> None:
    flaky.behave = lambda h, n: reply(h, 429 if n == 1 else 200, {}, Retry_After=asked)
    assert asyncio.run(_transport(flaky.url).get("/x")) == {}
    assert len(flaky.times) == 2


def test_backoff_grows(flaky: Flaky) -> None:
    flaky.behave = lambda h, n: reply(h, 200 if n == 4 else 503, {})
    asyncio.run(_transport(flaky.url, backoff=0.1).get("/x"))
    gaps = [b - a for a, b in zip(flaky.times, flaky.times[1:], strict=False)]
    assert gaps[0] >= 0.1 and gaps[1] >= 0.2 and gaps[2] >= 0.4


def test_retries_end_with_url_model_and_reason(flaky: Flaky) -> None:
    flaky.behave = lambda h, n: reply(h, 503, {"error": {"message": "loading weights"}})
    with pytest.raises(LLMUnavailable) as caught:
        asyncio.run(_transport(flaky.url).get("/x"))
    for part in (flaky.url, "the-model", "503", "loading weights", "4 attempt"):
        assert part in str(caught.value)
    assert len(flaky.times) == 4


def test_a_refusal_is_final_and_quotes_the_server(flaky: Flaky) -> None:
    flaky.behave = lambda h, n: reply(h, 400, {"error": {"message": "context too long"}})
    with pytest.raises(LLMError, match="context too long") as caught:
        asyncio.run(_transport(flaky.url).post("/x", {}))
    assert not isinstance(caught.value, LLMUnavailable)
    assert len(flaky.times) == 1


@pytest.mark.parametrize("status", [301, 401, 402, 403, 404, 405, 407, 410])
def test_a_server_that_lets_nobody_in_is_unavailable_at_once(flaky: Flaky, status: int) -> None:
    """A wrong key, url or model: nothing that another text would change."""
    flaky.behave = lambda h, n: reply(h, status, {"error": {"message": "bad key"}})
    with pytest.raises(LLMUnavailable, match=f"the-model.*{status}: bad key.*key") as caught:
        asyncio.run(_transport(flaky.url).post("/x", {}))
    assert flaky.url in str(caught.value) and len(flaky.times) == 1


def test_403_from_a_server_that_has_let_requests_in_is_about_the_text(flaky: Flaky) -> None:
    """As some content filters answer; models are listed for keys that have no right to them."""
    transport = _transport(flaky.url)
    asyncio.run(transport.get("/v1/models"))
    flaky.behave = lambda h, n: reply(h, 403 if n != 3 else 200, {})
    for kind in (LLMUnavailable, None, LLMError):
        if kind is None:
            asyncio.run(transport.post("/x", {}))
            continue
        with pytest.raises(LLMError) as caught:
            asyncio.run(transport.post("/x", {}))
        assert type(caught.value) is kind


def test_no_message_has_the_password_of_an_url(flaky: Flaky) -> None:
    url = flaky.url.replace("//", "//ann:hidden@")
    for behave in (
        lambda h, n: reply(h, 401, {}),
        lambda h, n: reply(h, 400, {}),
        lambda h, n: reply(h, 503, {}),
        lambda h, n: reply(h, 200, b"<html>"),
    ):
        flaky.behave = behave
        with pytest.raises(LLMError) as caught:
            asyncio.run(_transport(url, retries=0).post("/x", {}))
        assert "hidden" not in str(caught.value) and "127.0.0.1" in str(caught.value)


def test_a_mute_server_is_unavailable(flaky: Flaky) -> None:
    flaky.behave = lambda h, n: time.sleep(1.0)
    with pytest.raises(LLMUnavailable, match="no answer in time"):
        asyncio.run(_transport(flaky.url, timeout=0.2, retries=1).get("/x"))
    assert len(flaky.times) == 2


def test_an_answer_that_drips_is_given_up_in_time(flaky: Flaky) -> None:
    def drip(handler: BaseHTTPRequestHandler, _: int) -> None:
        handler.send_response(200)
        handler.send_header("content-length", "1000")
        handler.end_headers()
        with suppress(OSError):
            for _ in range(60):
                handler.wfile.write(b" ")
                time.sleep(0.05)

    flaky.behave = drip
    started = time.monotonic()
    with pytest.raises(LLMUnavailable, match=r"no answer in time.* after 2 attempt"):
        asyncio.run(_transport(flaky.url, timeout=0.4, retries=1).post("/x", {}))
    assert 0.8 < time.monotonic() - started < 2.5


def test_nobody_there_is_unavailable() -> None:
    with pytest.raises(LLMUnavailable, match=r"127\.0\.0\.1:9 .*the-model"):
        asyncio.run(_transport("http://127.0.0.1:9/v1", retries=1).get("/x"))


def test_no_json_is_an_error(flaky: Flaky) -> None:
    for body in (b"<html>", b"[1]"):
        flaky.behave = lambda h, n, body=body: reply(h, 200, body)
        with pytest.raises(LLMUnavailable, match="no JSON"):  # that is no LLM server
            asyncio.run(_transport(flaky.url).get("/x"))


def test_concurrency_is_bounded(flaky: Flaky) -> None:
    def slow(handler: BaseHTTPRequestHandler, number: int) -> None:
        time.sleep(0.05)
        reply(handler, 200, {})

    flaky.behave = slow

    async def crowd() -> None:
        transport = _transport(flaky.url, concurrency=3)
        await asyncio.gather(*(transport.get("/x") for _ in range(12)))
        await transport.aclose()

    asyncio.run(crowd())
    assert flaky.most_active == 3


def test_one_transport_serves_several_loops(flaky: Flaky) -> None:
    transport = _transport(flaky.url)
    assert asyncio.run(transport.get("/x")) == {}
    assert asyncio.run(transport.get("/x")) == {}


def test_one_transport_serves_the_loops_of_several_threads(flaky: Flaky) -> None:
    """Each opens and closes its own connections while the others do."""
    transport = _transport(flaky.url)

    async def once() -> dict[str, Any]:
        try:
            return await transport.get("/x")
        finally:
            await transport.aclose()

    with ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(lambda _: asyncio.run(once()), range(80)))
    assert replies == [{}] * 80


def _sse(handler: BaseHTTPRequestHandler, *events: str) -> None:
    reply(handler, 200, "".join(f"data: {event}\n\n" for event in events).encode())


async def _read(transport: Transport) -> list[dict[str, Any]]:
    return [event async for event in transport.events("/x", {})]


def test_streams_are_read_and_retried_before_they_start(flaky: Flaky) -> None:
    flaky.behave = lambda h, n: (
        reply(h, 503, {}) if n == 1 else _sse(h, '{"a": 1}', '{"a": 2}', "[DONE]")
    )
    assert asyncio.run(_read(_transport(flaky.url))) == [{"a": 1}, {"a": 2}]


def test_a_torn_stream_is_no_whole_answer(flaky: Flaky) -> None:
    flaky.behave = lambda h, n: _sse(h, '{"a": 1}')
    with pytest.raises(LLMUnavailable, match="before it was complete"):
        asyncio.run(_read(_transport(flaky.url)))
    flaky.behave = lambda h, n: _sse(h, '{"error": {"message": "engine died"}}')
    with pytest.raises(LLMError, match="engine died"):
        asyncio.run(_read(_transport(flaky.url)))


@pytest.mark.parametrize("streamed", [False, True])
def test_an_error_with_status_200_counts_as_the_status_that_it_names(
    flaky: Flaky, streamed: bool
) -> None:
    """As routers do (OpenRouter) when the model behind them fails."""

    def ask(*bodies: dict[str, Any]) -> Any:
        send = (lambda h, body: _sse(h, json.dumps(body), "[DONE]")) if streamed else (
            lambda h, body: reply(h, 200, body)
        )  # fmt: skip
        flaky.times.clear()
        flaky.behave = lambda h, n: send(h, bodies[min(n, len(bodies)) - 1])
        transport = _transport(flaky.url)
        return asyncio.run(_read(transport) if streamed else transport.post("/x", {}))

    def failure(code: object) -> dict[str, Any]:
        return {"error": {"message": "no luck", "code": code}}

    fine = {"choices": [], "error": None}
    assert ask(failure(429), failure(502), fine) == ([fine] if streamed else fine)
    with pytest.raises(LLMUnavailable, match=r"502: no luck, after 4 attempt"):
        ask(failure(502))
    with pytest.raises(LLMUnavailable, match=r"402: no luck; correct key"):
        ask(failure(402))
    for final in (failure(400), failure("content_filter"), {"error": "no luck"}):
        with pytest.raises(LLMError, match="no luck") as caught:
            ask(final)
        assert not isinstance(caught.value, LLMUnavailable) and len(flaky.times) == 1


def test_a_failure_within_a_stream_is_passing_where_its_code_says_so(flaky: Flaky) -> None:
    flaky.behave = lambda h, n: _sse(h, '{"a": 1}', '{"error": {"message": "gone", "code": 502}}')
    with pytest.raises(LLMUnavailable, match="the stream broke: status 502: gone"):
        asyncio.run(_read(_transport(flaky.url)))
    assert len(flaky.times) == 1  # what was said can't be taken back


def test_a_stream_left_early_frees_its_place(flaky: Flaky) -> None:
    flaky.behave = lambda h, n: _sse(h, *['{"a": 1}'] * 50, "[DONE]")

    async def run() -> None:
        transport = _transport(flaky.url, concurrency=1)
        for _ in range(3):
            events = transport.events("/x", {})
            async for _event in events:
                break
            await events.aclose()

    asyncio.run(asyncio.wait_for(run(), 20))


def _backend(flaky: Flaky, folder: Path, card: dict[str, Any]) -> VLLMBackend:
    flaky.behave = lambda h, n: reply(h, 200, {"data": [card]})
    config = LLMConfig(backend="vllm", url=flaky.url, retries=0)
    return VLLMBackend(str(folder), config, backoff_seconds=0.01)


def test_the_served_name_is_found_or_refused(flaky: Flaky, lm_folder: Path) -> None:
    alias = {"id": "alias", "root": str(lm_folder), "max_model_len": 333}
    backend = _backend(flaky, lm_folder, alias)
    asyncio.run(backend.ready())
    assert (backend._served, backend.context_length) == ("alias", 333)
    with pytest.raises(LLMUnavailable, match="serves other, not"):
        asyncio.run(_backend(flaky, lm_folder, {"id": "other", "root": "other"}).ready())


def test_unknown_fields_pass_through_unchanged(flaky: Flaky, lm_folder: Path) -> None:
    backend = _backend(flaky, lm_folder, {"id": str(lm_folder), "max_model_len": 333})
    asyncio.run(backend.ready())
    choice = {"message": {"content": None, "tool_calls": [1]}, "finish_reason": "tool_calls"}
    flaky.behave = lambda h, n: reply(h, 200, {"choices": [choice]})
    extra = {"tools": [{"type": "function"}], "new_field": {"x": 1}}
    got = asyncio.run(
        backend.chat(
            Chat([{"role": "user", "content": "<|im_end|>"}], max_tokens=3, seed=5, extra=extra)
        )
    )
    sent = flaky.bodies[-1]
    assert got.text == "" and got.raw["choices"][0]["message"]["tool_calls"] == [1]
    assert sent["tools"] == extra["tools"] and sent["new_field"] == {"x": 1}
    assert (sent["max_tokens"], sent["seed"], sent["temperature"]) == (3, 5, 0.0)
    assert sent["messages"][0]["content"] != "<|im_end|>"


def test_an_answer_of_another_shape_is_an_error(flaky: Flaky, lm_folder: Path) -> None:
    backend = _backend(flaky, lm_folder, {"id": str(lm_folder), "max_model_len": 333})
    asyncio.run(backend.ready())
    context: Any = [{"role": "user", "content": "x"}]
    for body in ({}, {"choices": []}, {"choices": [{"logprobs": None, "prompt_logprobs": [None]}]}):
        flaky.behave = lambda h, n, body=body: reply(h, 200, body)
        for call in (
            lambda: backend.chat(Chat(context, max_tokens=1)),
            lambda: backend.loglikelihood(context, "y"),
            lambda: backend.label_probabilities(context, ["0", "1"]),
        ):
            with pytest.raises(LLMError, match="unexpected reply"):
                asyncio.run(call())


def test_likelihoods_that_wait_together_share_requests(flaky: Flaky, lm_folder: Path) -> None:
    backend = _backend(flaky, lm_folder, {"id": str(lm_folder), "max_model_len": 333})
    asyncio.run(backend.ready())

    def score(handler: BaseHTTPRequestHandler, number: int) -> None:
        """Each token's log-probability is minus its own id; choices come in reverse."""
        prompts = flaky.bodies[number - 1]["prompt"]
        rows = [[None, *({str(i): {"logprob": -i}} for i in ids[1:])] for ids in prompts]
        choices = [{"index": i, "prompt_logprobs": row} for i, row in enumerate(rows)]
        reply(handler, 200, {"choices": choices[::-1]})

    flaky.behave = score
    sent = len(flaky.bodies)
    context: Any = [{"role": "user", "content": "x"}]
    answers = [f"answer {'y' * (i % 7 + 1)}" for i in range(40)]

    async def run() -> list[LogLikelihood]:
        return await asyncio.gather(*(backend.loglikelihood(context, a) for a in answers))

    found = asyncio.run(run())
    ids = [backend.chat_tokenizer.encode(answer) for answer in answers]
    assert found == [LogLikelihood(-sum(row), len(row)) for row in ids]
    sizes = [len(body["prompt"]) for body in flaky.bodies[sent:]]
    assert sum(sizes) == 40 and max(sizes) == 16 and flaky.most_active <= 2
