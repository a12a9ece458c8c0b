"""What the client does without a gateway: light imports, errors, retries, reading streams."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest

import memshare
from memshare.client import (
    AsyncClient,
    AuthenticationError,
    Client,
    ConnectionFailed,
    GatewayError,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unavailable,
)

Handler = Callable[[httpx.Request], httpx.Response]


def connected(handler: Handler, **options: Any) -> Client:
    """A client whose replies ``handler`` makes: no gateway can be had to misbehave so."""
    client = Client("http://gateway", **options)
    client._http = httpx.Client(
        base_url="http://gateway", headers=client._http.headers, transport=_mock(handler)
    )
    return client


def _mock(handler: Handler) -> httpx.MockTransport:
    return httpx.MockTransport(handler)


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    naps: list[float] = []
    monkeypatch.setattr(time, "sleep", naps.append)
    yield naps


def refusal(status: int, code: str, **headers: str) -> httpx.Response:
    error = {"message": "no", "type": "t", "param": "p", "code": code}
    return httpx.Response(status, json={"error": error}, headers=headers)


def test_importing_memshare_and_its_client_is_light() -> None:
    code = "import sys, memshare\nprint(*sys.modules)\nmemshare.Client\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    bare, client = (set(line.split()) for line in done.stdout.splitlines())
    assert "httpx" not in bare and "memshare.client" not in bare
    heavy = {"torch", "faiss", "transformers", "sqlalchemy", "fastapi", "numpy", "pydantic", "mcp"}
    assert "httpx" in client and not client & heavy
    assert (memshare.Client, memshare.AsyncClient) == (Client, AsyncClient)
    with pytest.raises(AttributeError, match="Klient"):
        memshare.Klient  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, InvalidRequest), (401, AuthenticationError), (404, NotFound), (422, InvalidRequest),
     (500, GatewayError), (418, GatewayError)],
)  # fmt: skip
def test_refusals_are_exceptions_that_say_it_all(status: int, kind: type[GatewayError]) -> None:
    client = connected(lambda _: refusal(status, "why", **{"X-Request-Id": "r-1"}))
    with pytest.raises(kind) as caught:
        client.get("x")
    error = caught.value
    assert (error.status, error.code, error.param, error.type) == (status, "why", "p", "t")
    assert error.request_id == "r-1" and str(error) == f"{status}: no"


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"error": "text"}', b'{"error": {}}'])
def test_what_another_server_answers_is_still_a_gateway_error(body: bytes) -> None:
    with pytest.raises(GatewayError) as caught:
        connected(lambda _: httpx.Response(502, content=body)).get("x")
    assert caught.value.status == 502 and caught.value.code is None


OPENAI = {"id": "x", "choices": [{"index": 0, "message": {"content": "hi"}}], "usage": {}}


@pytest.mark.parametrize(
    "reply",
    [
        httpx.Response(200, html="<html>\n<p>data: welcome</p>"),
        httpx.Response(200, json=OPENAI),
        httpx.Response(200, json=[1]),
        httpx.Response(200, json={"memshare": {}, "choices": []}),
        httpx.Response(200, content=b"\xff\xfe"),
        httpx.Response(204),
        httpx.Response(302, headers={"Location": "https://login.example/?next=/v1"}),
        httpx.Response(304),
    ],
    ids=lambda reply: f"{reply.status_code} {reply.content[:12]!r}",
)
def test_a_reply_of_something_else_asks_whether_this_is_a_gateway(reply: httpx.Response) -> None:
    client = connected(lambda _: reply)
    asks: tuple[Callable[[], object], ...] = (
        lambda: client.chat("q"), lambda: client.add("p", "q", "a"), lambda: client.get("x"),
        lambda: client.search("p", "q"), lambda: client.list("p"), client.generations,
        lambda: client.feedback("x", "up"),
    )  # fmt: skip
    for ask in asks:
        with pytest.raises(GatewayError, match="is this a memshare gateway") as caught:
            ask()
        assert caught.value.status == reply.status_code
    to = reply.headers.get("location")
    assert to is None or to in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [
        "<html>\n<p>data: welcome</p>", json.dumps(OPENAI), "data: {broken\n\n", "data: 1\n\n",
        'data: {"error": "text"}\n\n', 'data: {"choices": [1]}\n\n',
    ],
)  # fmt: skip
def test_a_stream_of_something_else_asks_so_too(body: str) -> None:
    with pytest.raises(GatewayError, match="is this a memshare gateway"):
        list(connected(lambda _: httpx.Response(200, text=body)).stream("q"))
    sent_on = httpx.Response(302, headers={"Location": "https://login.example/"})
    with pytest.raises(GatewayError, match=r"302.*login\.example.*is this a memshare gateway"):
        list(connected(lambda _: sent_on).stream("q"))


def test_what_passes_is_tried_again_as_the_gateway_says(slept: list[float]) -> None:
    replies = [
        refusal(429, "rate_limited", **{"Retry-After": "7"}),
        refusal(503, "llm_unavailable"),
        httpx.Response(200, json={"id": "x", "deleted": True}),
    ]
    connected(lambda _: replies.pop(0)).delete("x")
    assert slept == [7.0, 1.0]
    with pytest.raises(Overloaded) as caught:
        connected(lambda _: refusal(429, "busy", **{"Retry-After": "31"})).delete("x")
    assert caught.value.retry_after == 31  # too long to sleep without a word
    with pytest.raises(Unavailable):
        connected(lambda _: refusal(503, "busy"), retries=0).delete("x")
    assert slept == [7.0, 1.0]


@pytest.mark.parametrize("asked", ["-1", "nan", "-inf", "Mon, 01 Jan 2001 00:00:00 GMT", "soon"])
def test_a_wait_that_is_none_is_the_clients_own(slept: list[float], asked: str) -> None:
    busy = refusal(429, "busy", **{"Retry-After": asked})
    with pytest.raises(Overloaded) as caught:
        connected(lambda _: busy, retries=1).delete("x")
    assert slept == [0.5] and caught.value.retry_after is None


def test_only_a_connection_that_was_never_made_is_tried_again(slept: list[float]) -> None:
    tried: list[str] = []

    def broken(kind: type[httpx.TransportError]) -> Handler:
        def handler(request: httpx.Request) -> httpx.Response:
            tried.append(kind.__name__)
            raise kind("gone")

        return handler

    for kind in (httpx.ConnectError, httpx.ConnectTimeout, httpx.ReadError, httpx.ReadTimeout):
        with pytest.raises(ConnectionFailed, match="gone") as caught:
            connected(broken(kind)).add("p", "q", "a")
        assert ("can't be reached" in str(caught.value)) == (kind.__name__.startswith("Connect"))
    made = ["ReadError", "ReadTimeout"]
    assert tried == ["ConnectError"] * 3 + ["ConnectTimeout"] * 3 + made


def test_key_and_url_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMSHARE_KEY", "ms-env")
    monkeypatch.setenv("MEMSHARE_URL", "http://from-env/")
    with Client() as client:
        assert client._http.headers["authorization"] == "Bearer ms-env"
        assert str(client._http.base_url).rstrip("/") == "http://from-env"
    with Client("http://here", "ms-mine") as client:
        assert client._http.headers["authorization"] == "Bearer ms-mine"


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_key_or_url_that_can_be_none_is_refused_at_once(kind: type[Client]) -> None:
    assert kind("http://g", "ms-secret\n")._http.headers["authorization"] == "Bearer ms-secret"
    for key in ("ms-secret\u2026", "ms-sec\nret", "ms-sec\udc80ret"):
        with pytest.raises(ValueError, match="MEMSHARE_KEY") as caught:
            kind("http://g", key)
        assert "ms-sec" not in str(caught.value)  # it is no longer secret once an agent reads it
    for url in ("localhost:8000", "gateway", "http://", "http://host:port", "http://[::1", "ftp://g",
                "http://\udc80", "http://host:65536"):  # fmt: skip
        with pytest.raises(ValueError, match="MEMSHARE_URL"):
            kind(url)


def test_what_can_not_be_sent_is_a_wrong_request() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        return refusal(404, "unknown_memory")

    half, client = "half a pair: \ud83d", connected(handler)
    for ask in (
        lambda: client.add("p", half, "a"), lambda: client.search("p", half),
        lambda: client.chat(half), lambda: list(client.stream(half)), lambda: client.list(half),
        lambda: client.get("x" * 100_000), lambda: client.feedback("x", "up", half),
    ):  # fmt: skip
        with pytest.raises(InvalidRequest, match="can't be sent"):
            ask()
    with pytest.raises(NotFound):
        client.get(half)

    async def body() -> None:
        async with AsyncClient("http://gateway") as client:
            with pytest.raises(InvalidRequest, match="can't be sent"):
                await client.add("p", half, "a")

    asyncio.run(body())


def test_ids_can_not_leave_their_place_in_the_path() -> None:
    seen: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request.url.raw_path.decode())
        return refusal(404, "unknown_memory")

    with pytest.raises(NotFound):
        connected(handler).delete("../retrievers?x=1")
    assert seen == ["/v1/memories/..%2Fretrievers%3Fx%3D1"]


def stream(*events: object, done: bool = True) -> httpx.Response:
    lines = [f"data: {json.dumps(event)}\n\n" for event in events]
    return httpx.Response(200, text="".join(lines) + ("data: [DONE]\n\n" if done else ""))


def test_a_stream_that_breaks_off_raises() -> None:
    delta = {"choices": [{"index": 0, "delta": {"content": "hi"}}], "memshare": {"memories": []}}
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    chunks = list(connected(lambda _: stream(delta, last, {"usage": {}})).stream("q"))
    assert [chunk.text for chunk in chunks] == ["hi", "", ""]
    assert chunks[0].note == {"memories": []} and chunks[1].finish_reason == "stop"
    with pytest.raises(ConnectionFailed, match="before it was complete"):
        list(connected(lambda _: stream(delta, done=False)).stream("q"))
    padded = httpx.Response(200, text=": hello\n\nevent: chunk\ndata: {}\n\ndata: [DONE]\n\n")
    assert len(list(connected(lambda _: padded).stream("q"))) == 1
    error = {"error": {"message": "gone", "code": "llm_unavailable"}}
    with pytest.raises(GatewayError, match="gone") as caught:
        list(connected(lambda _: stream(delta, error)).stream("q"))
    assert caught.value.code == "llm_unavailable"


def test_a_stream_has_any_text() -> None:
    said = "one\u2028two\u2029three\x85four\x1c\u00e9"
    event = {"choices": [{"index": 0, "delta": {"content": said}}]}
    body = f"data: {json.dumps(event, ensure_ascii=False)}\r\n\r\ndata: [DONE]".encode()
    pieces = [body[at : at + 3] for at in range(0, len(body), 3)]  # within characters, too

    async def chunks() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    client = connected(lambda _: httpx.Response(200, content=iter(pieces)))
    assert [chunk.text for chunk in client.stream("q")] == [said]

    async def body_of() -> list[str]:
        handler = _mock(lambda _: httpx.Response(200, content=chunks()))
        async with AsyncClient("http://gateway") as client:
            client._http = httpx.AsyncClient(base_url="http://gateway", transport=handler)
            return [chunk.text async for chunk in client.stream("q")]

    assert asyncio.run(body_of()) == [said]


def test_an_answer_in_parts_is_read_as_its_text() -> None:
    parts = [{"type": "thinking", "thinking": []}, {"text": "an "}, {"text": "answer"}]
    note = {"generation": None, "memories": [], "write": "off", "reason": None}
    choice = {"message": {"content": parts}, "finish_reason": "stop"}
    whole = httpx.Response(200, json={"choices": [choice], "memshare": note})
    assert connected(lambda _: whole).chat("q").text == "an answer"
    pieces = [{"choices": [{"delta": {"content": content}}]} for content in (parts[:2], parts[2:])]
    body = "".join(f"data: {json.dumps(piece)}\n\n" for piece in pieces) + "data: [DONE]\n\n"
    client = connected(lambda _: httpx.Response(200, text=body))
    assert [chunk.text for chunk in client.stream("q")] == ["an ", "answer"]


def test_the_async_client_has_the_same_methods_and_retries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    public = {name for name in vars(Client) if not name.startswith("_")} - {"close"}
    assert public == {n for n in vars(AsyncClient) if not n.startswith("_")} - {"aclose"}
    naps: list[float] = []

    async def nap(seconds: float) -> None:
        naps.append(seconds)

    replies = [refusal(503, "x"), httpx.Response(200, json={"id": "x", "standing": 1, "votes": 2})]

    async def body() -> None:
        async with AsyncClient("http://gateway") as client:
            transport = _mock(lambda _: replies.pop(0))
            client._http = httpx.AsyncClient(base_url="http://gateway", transport=transport)
            assert (await client.feedback("x", "up")).votes == 2

    monkeypatch.setattr(asyncio, "sleep", nap)
    asyncio.run(body())
    assert naps == [0.5]
