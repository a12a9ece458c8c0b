"""Malformed input: every refusal in OpenAI's form, never a 5xx; and what /openapi.json promises."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memshare.pool.errors import PoolError
from memshare.pool.store import PoolStore
from memshare.retrieval.encoder import Encoder
from tests.retrieving import publish_now
from tests.unit.gateway.conftest import running

POSTS = ["/v1/chat/completions", "/v1/memories", "/v1/memories/search"]
JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 422),
        (b"{", 400),
        (b"nonsense", 400),
        (b'{"pool": "\xff\xfe"}', 400),
        (b'{"pool": "\\ud800"}', 400),
        (b'{"pool": NaN}', 400),
        (b"[" * 100_000, 400),
        (b"null", 422),
        (b"[]", 422),
        (b'"text"', 422),
        (b'{"unknown": 1}', 422),
    ],
)
def test_bad_bodies(client: TestClient, path: str, body: bytes, status: int) -> None:
    reply = client.post(path, content=body, headers=JSON)
    assert reply.status_code == status, reply.text
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert reply.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("kind", [None, "application/x-www-form-urlencoded"])
def test_a_body_that_is_not_called_json_is_told_so(client: TestClient, kind: str | None) -> None:
    """`curl -d` without the header: that the body is no object would be no help."""
    headers = {} if kind is None else {"Content-Type": kind}
    body = b'{"pool": "keep", "query": "q"}'
    reply = client.post("/v1/memories/search", content=body, headers=headers)
    assert reply.status_code == 422
    message = reply.json()["error"]["message"]
    assert "Content-Type: application/json" in message and repr(kind) in message


@pytest.mark.parametrize(
    ("path", "change", "where"),
    [
        ("/v1/chat/completions", {"messages": [0] * 99}, "messages.{}:"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [0] * 99}]}, ".{}:"),
        ("/v1/chat/completions", {"stop": [0] * 99}, "stop.list[str].{}:"),
        (
            "/v1/memories/search",
            {"filter": {"metadata": dict.fromkeys("abcdefghijklmnopq")}},
            "{}.",
        ),
    ],
)
def test_of_a_list_of_faults_the_first_is_told(
    client: TestClient, path: str, change: dict[str, Any], where: str
) -> None:
    """To tell all 450,000 that a megabyte can hold took the event loop six seconds."""
    good: dict[str, Any] = {"pool": "keep", "query": "q"}
    if path.endswith("completions"):
        good = {"messages": [{"role": "user", "content": "q"}]}
    reply = client.post(path, json={**good, **change})
    assert reply.status_code == 422
    message = reply.json()["error"]["message"]
    assert where.format(1) not in message, message
    assert where.format(0) in message or "at most 16" in message, message


def test_body_limit_holds_while_the_body_streams_in(tmp_path: Path, models: Path) -> None:
    with running(tmp_path, models, gateway={"max_body_bytes": 1000}) as client:
        for body in (b"x" * 1001, iter([b"x" * 600, b"x" * 600])):  # with a length, and chunked
            reply = client.post("/v1/memories", content=body, headers=JSON)
            assert reply.status_code == 413
            assert "1000 bytes" in reply.json()["error"]["message"]
        item = {"pool": "keep", "prompt": "p", "answer": "x" * 800}
        assert client.post("/v1/memories", json={"items": [item]}).status_code == 201


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"k": 0}, 422),
        ({"k": 1001}, 422),
        ({"k": "3"}, 422),
        ({"k": True}, 422),
        ({"k": 10**30}, 400),
        ({"query": ""}, 422),
        ({"query": " \t"}, 422),
        ({"query": "a\x00b"}, 422),
        ({"query": "x" * 32_769}, 422),
        ({"query": 5}, 422),
        ({"pool": "nowhere"}, 404),
        ({"pool": "k\x00"}, 404),
        ({"filter": {"agent": 5}}, 422),
        ({"filter": {"created_after": "yesterday"}}, 422),
        ({"filter": {"colour": "red"}}, 422),
    ],
)
def test_bad_searches(client: TestClient, change: dict[str, Any], status: int) -> None:
    body = {"pool": "keep", "query": "q", "k": 1, **change}
    reply = client.post("/v1/memories/search", json=body)
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["message"]


def test_unknown_routes_and_methods(client: TestClient) -> None:
    for method, path, status in (("GET", "/nowhere", 404), ("PUT", "/v1/memories", 405)):
        reply = client.request(method, path)
        assert reply.status_code == status
        assert reply.json()["error"]["message"]


def test_requests_are_counted_by_route_not_by_path(client: TestClient) -> None:
    for number in range(3):
        client.get(f"/v1/memories/unknown{number}")
    text = client.get("/metrics").text
    label = 'method="GET",route="/v1/memories/{id}",status="404"'
    assert f"memshare_requests_total{{{label}}}" in text
    assert "unknown1" not in text
    for name in ("generation 0.0", 'memories{pool="keep"}', "scoring_queue 0.0", "swaps_total 0.0"):
        assert f"memshare_{name}" in text


def test_metrics_without_the_database_tell_the_rest(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "memshare_database_error 0.0" in client.get("/metrics").text

    def away(store: PoolStore, pool: str) -> None:
        raise PoolError("away")

    monkeypatch.setattr(PoolStore, "size", away)  # which nothing else asks for meanwhile
    reply = client.get("/metrics")
    assert reply.status_code == 200
    assert "memshare_database_error 1.0" in reply.text
    for name in ("feed_error 0.0", "generation 0.0", "requests_total{"):
        assert f"memshare_{name}" in reply.text
    assert "memshare_memories" not in reply.text and "memshare_scoring_queue" not in reply.text


def test_openapi_names_the_errors_that_come(client: TestClient) -> None:
    page = client.get("/openapi.json").json()
    assert "HTTPValidationError" not in json.dumps(page)
    for path in POSTS:
        replies = page["paths"][path]["post"]["responses"]
        assert {"400", "404", "413", "422", "503"} <= set(replies)
        schema = replies["422"]["content"]["application/json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/ErrorReply"}


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    ["messages", "memory", "pool", "query", "k", "filter", "items", "prompt", "answer", "metadata",
     "stream", "n", "stop", "temperature", "seed", "max_tokens", "role", "content", "tools"]
)  # fmt: skip


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(path=st.sampled_from(POSTS), body=st.dictionaries(FIELDS, ANY, max_size=5))
def test_no_body_breaks_the_gateway(client: TestClient, path: str, body: dict[str, Any]) -> None:
    text = json.dumps(body)  # NaN and lone surrogates and all
    good: dict[str, Any] = {"pool": "keep", "query": "q"}
    if path.endswith("completions"):
        good = {"messages": [{"role": "user", "content": "q"}], "max_tokens": 2}
    for content in (text, json.dumps({**good, **body}), json.dumps({"items": [body]})):
        reply = client.post(path, content=content.encode(), headers=JSON)
        assert reply.status_code < 500, (content, reply.text)


def test_a_roll_back_that_the_disk_does_not_take_is_no_bug(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with running(tmp_path, models) as client:
        app: Any = client.app
        shared = app.state.gateway.shared
        publish_now(shared.store, shared.config, Encoder.load(shared.config.encoder))
        # Full, or read-only, in which case not even the lock is to be had.
        for call in ("os.fsync", "memshare.retrieval.shelf.fcntl.flock"):
            with monkeypatch.context() as patch:
                patch.setattr(call, full)
                reply = client.post("/v1/retrievers/main/generations/1/activate")
            error = reply.json()["error"]
            assert (reply.status_code, error["code"]) == (503, "current_not_written")
            assert "No space" in error["message"]
        assert client.post("/v1/retrievers/main/generations/1/activate").status_code == 200
