"""Keys at the door: who may do what on every route, limits per key, request ids, and the log."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import event

from memshare.gateway import access
from memshare.gateway.logs import JsonLines
from memshare.pool.errors import PoolUnavailable
from memshare.pool.keys import KeyRing
from memshare.pool.store import PoolStore
from memshare.retrieval.encoder import Encoder
from tests.callers import Caller
from tests.retrieving import fill, publish_now
from tests.unit.gateway.conftest import running


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def gated(run_dir: Path, models: Path) -> Iterator[TestClient]:
    with running(run_dir, models, keys_required=True) as client:
        yield client


ROUTES = [
    ("GET", "/v1/models"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/memories"),
    ("POST", "/v1/memories/search"),
    ("GET", "/v1/memories?pool=keep"),
    ("GET", "/v1/memories/x"),
    ("DELETE", "/v1/memories/x"),
    ("POST", "/v1/memories/x/feedback"),
    ("POST", "/v1/memories/x/hold"),
    ("POST", "/v1/memories/x/release"),
    ("GET", "/v1/retrievers/main/generations"),
    ("POST", "/v1/retrievers/main/generations/0/activate"),
    ("GET", "/metrics"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_asks_for_a_key(gated: TestClient, method: str, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer ms-nonsense"}, {"Authorization": "Basic ms-x"}):
        reply = gated.request(method, path, headers=headers, content=b"{")
        assert reply.status_code == 401, reply.text  # before the body is even read
        assert reply.headers["www-authenticate"] == "Bearer"
        error = reply.json()["error"]
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")


def test_the_list_of_routes_is_whole(gated: TestClient) -> None:
    page = gated.get("/openapi.json").json()["paths"]
    asked = {path.split("?")[0].replace("/x", "/{id}") for _, path in ROUTES}
    asked = {path.replace("main", "{name}").replace("/0/", "/{number}/") for path in asked}
    assert set(page) - asked == {"/healthz", "/readyz"}
    for path in page:
        for operation in page[path].values():
            assert ("security" in operation) == (path in asked)


def test_health_is_open(gated: TestClient) -> None:
    assert gated.get("/healthz").status_code == gated.get("/readyz").status_code == 200


def test_rights_hold_on_every_route(gated: TestClient) -> None:
    root = Caller(gated, "root", every="admin")
    reader = Caller(gated, "reader", keep="read")
    writer = Caller(gated, "writer", keep="write")
    both = Caller(gated, "both", keep="read write")
    owner = Caller(gated, "owner", keep="admin")
    nobody = Caller(gated, "nobody", other="admin")
    id_ = root.add("keep", "rights on routes").json()["results"][0]["id"]
    own = both.add("keep", "written by both").json()["results"][0]["id"]

    def statuses(method: str, path: str, body: Any = None) -> list[int]:
        callers = (reader, writer, both, owner, nobody)
        return [caller(method, path, json=body).status_code for caller in callers]

    item = {"pool": "keep", "prompt": "rights on routes", "answer": "of rights on routes"}
    add, search = {"items": [item]}, {"pool": "keep", "query": "rights", "k": 1}
    assert statuses("POST", "/v1/memories", add) == [403, 201, 201, 201, 403]
    assert statuses("POST", "/v1/memories", {**add, "import": True}) == [403, 403, 403, 201, 403]
    assert statuses("POST", "/v1/memories/search", search) == [200, 403, 200, 200, 403]
    assert statuses("GET", "/v1/memories?pool=keep") == [200, 403, 200, 200, 403]
    assert statuses("GET", f"/v1/memories/{id_}") == [200, 404, 200, 200, 404]
    vote = {"value": "up"}
    assert statuses("POST", f"/v1/memories/{id_}/feedback", vote) == [403, 404, 200, 200, 404]
    assert statuses("GET", "/v1/retrievers/main/generations") == [200] * 5
    assert statuses("POST", "/v1/retrievers/main/generations/9/activate") == [403] * 5
    refused = nobody("POST", "/v1/retrievers/main/generations/9/activate").text
    assert "every pool" in refused  # and not which they are: it may not know of them
    assert "keep" not in refused and "strict" not in refused
    assert root("POST", "/v1/retrievers/main/generations/9/activate").status_code == 404
    assert statuses("GET", "/metrics") == [403] * 5 and root("GET", "/metrics").status_code == 200
    assert statuses("GET", "/v1/models") == [200] * 5
    assert statuses("DELETE", f"/v1/memories/{id_}") == [403, 404, 403, 200, 404]
    assert both("DELETE", f"/v1/memories/{own}").status_code == 200  # its own


def test_generations_name_the_pools_that_a_key_may_read_alone(tmp_path: Path, models: Path) -> None:
    with running(tmp_path, models, keys_required=True) as client:
        shared = client.app.state.gateway.shared  # type: ignore[attr-defined]
        fill(shared.store, "keep", 3)
        fill(shared.store, "strict", 2)
        encoder = Encoder.from_folder(models / "encoder", device="cpu")
        publish_now(shared.store, shared.config, encoder)

        def told(**rights: str) -> tuple[dict[str, int], str]:
            reply = Caller(client, "ann", **rights)("GET", "/v1/retrievers/main/generations")
            (generation,) = reply.json()["generations"]
            return generation["positions"], reply.text

        assert told(every="read")[0] == {"keep": 3, "strict": 2}
        positions, text = told(keep="read", strict="write")
        assert positions == {"keep": 3} and "strict" not in text
        assert told(other="admin")[0] == {}


def test_nobody_votes_for_a_memory_of_their_own(gated: TestClient) -> None:
    ann = Caller(gated, "ann", keep="read write")
    second = Caller(gated, "ann", keep="admin")  # another key, the same principal
    ben = Caller(gated, "ben", keep="read write")
    path = f"/v1/memories/{ann.add('keep', 'self-praise').json()['results'][0]['id']}"
    for caller in (ann, second):
        reply = caller("POST", f"{path}/feedback", json={"value": "up"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "own_memory")
    assert ben("GET", path).json()["votes"] == 0
    assert ben("POST", f"{path}/feedback", json={"value": "up"}).json()["votes"] == 1


def test_chat_needs_the_rights_it_uses(gated: TestClient) -> None:
    reader = Caller(gated, "reader", keep="read")
    writer = Caller(gated, "writer", keep="write")
    nobody = Caller(gated, "nobody", other="admin")
    assert reader.chat().json()["memshare"]["reason"] == "this key may not write to the pool"
    assert reader.chat(write=True).status_code == 403
    assert writer.chat().status_code == 403  # shots are read
    assert writer.chat(shots=0).json()["memshare"]["write"] == "pending"
    assert nobody.chat().status_code == 403
    assert nobody.chat(shots=0, write=False).status_code == 200


def test_a_pool_without_rights_looks_the_same_there_or_not(gated: TestClient) -> None:
    caller = Caller(gated, "ann", keep="read")
    there, missing = (caller.search(pool, "x") for pool in ("strict", "nowhere"))
    assert there.status_code == missing.status_code == 403
    assert there.text == missing.text.replace("nowhere", "strict")
    granted = Caller(gated, "ann", nowhere="read").search("nowhere", "x")
    assert granted.status_code == 404
    assert "keep" not in granted.text and "strict" not in granted.text


def test_a_chat_tells_nothing_of_a_pool_that_it_does_not_use(gated: TestClient) -> None:
    caller = Caller(gated, "ann", keep="read")
    for more in ({"shots": 0}, {"shots": 0, "write": False}, {"shots": 0, "write": True}, {}):
        there, missing = (caller.chat(pool=pool, **more) for pool in ("strict", "nowhere"))
        assert there.status_code == missing.status_code, more
        if there.status_code == 200:
            assert there.json()["memshare"] == missing.json()["memshare"]
        else:
            assert there.text == missing.text.replace("nowhere", "strict")


def test_provenance_is_the_keys(gated: TestClient) -> None:
    ann = Caller(gated, "ann", keep="read write")
    item = {"pool": "keep", "prompt": "who am I", "answer": "x", "agent": "root", "score": 100}
    (result,) = ann("POST", "/v1/memories", json={"items": [item]}).json()["results"]
    memory = ann("GET", f"/v1/memories/{result['id']}").json()
    assert (memory["agent"], memory["score"]) == ("ann", None)


def test_rate_and_body_limits_are_each_keys_own(gated: TestClient) -> None:
    slow = Caller(gated, "slow", 3, 200, keep="read write")
    free = Caller(gated, "free", keep="read write")
    assert slow.add("keep", "x" * 200).status_code == 413
    replies = [slow("GET", "/v1/models") for _ in range(4)]
    assert [reply.status_code for reply in replies] == [200, 200, 429, 429]
    error = replies[-1].json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limited")
    assert 0 < int(replies[-1].headers["retry-after"]) <= 60
    assert free.add("keep", "x" * 200).status_code == 201
    text = Caller(gated, "root", every="read")("GET", "/metrics").text
    assert 'memshare_shed_total{reason="rate"} 2.0' in text


def test_a_revoked_key_is_refused(
    gated: TestClient, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = Caller(gated, "ann", keep="read")
    assert ann("GET", "/v1/models").status_code == 200
    with PoolStore.open(f"sqlite:///{run_dir}/pool.db") as store:
        KeyRing(store.database).revoke(ann.key.id)
    monkeypatch.setattr("memshare.gateway.access.TRUST_SECONDS", 0.0)
    reply = ann("GET", "/v1/models")
    assert reply.status_code == 401 and "revoked" in reply.json()["error"]["message"]


def test_what_can_be_no_key_is_neither_looked_up_nor_kept(
    gated: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It costs whoever makes it up nothing, and headers may be long."""
    gateway: Any = gated.app.state.gateway  # type: ignore[attr-defined]
    asked: list[str] = []
    monkeypatch.setattr(gateway.access._ring, "find", asked.append)
    before = len(gateway.access._seen)
    possible = "ms-" + "x" * 43
    for made_up in ("ms-", "ms-nonsense", possible + "x", "ms-" + "x" * 50_000, possible):
        reply = gated.get("/v1/models", headers={"Authorization": f"Bearer {made_up}"})
        assert reply.status_code == 401
    assert asked == [possible] and len(gateway.access._seen) == before + 1


def test_on_loopback_a_key_counts_and_none_is_needed(client: TestClient) -> None:
    assert client.get("/v1/models").status_code == 200
    for made_up, status in (("none", 200), ("sk-of-another-service", 200), ("ms-typo", 401)):
        headers = {"Authorization": f"Bearer {made_up}"}
        assert client.get("/v1/models", headers=headers).status_code == status


def test_too_many_at_once_are_refused_and_health_is_not(tmp_path: Path, models: Path) -> None:
    with running(tmp_path, models) as client:
        admission: Any = client.app.middleware_stack  # type: ignore[attr-defined]
        while not hasattr(admission, "_active"):
            admission = admission.app
        admission._active.update({True: 256, False: 1024})
        ask = {"messages": [{"role": "user", "content": "hi"}]}
        for reply in (client.get("/v1/models"), client.post("/v1/chat/completions", json=ask)):
            assert reply.status_code == 429 and reply.json()["error"]["code"] == "overloaded"
            assert int(reply.headers["retry-after"]) > 0
            assert reply.headers["x-request-id"]
        assert client.get("/readyz").status_code == 200
        admission._active.update({True: 0, False: 0})
        assert client.get("/v1/models").status_code == 200
        assert admission._active == {True: 0, False: 0}


def test_request_ids_are_taken_over_or_made(client: TestClient) -> None:
    mine = client.get("/healthz", headers={"X-Request-Id": "trace-1.a:b_c"})
    assert mine.headers["x-request-id"] == "trace-1.a:b_c"
    for bad in ("", "with space", "x" * 129, "new\tline"):
        made = client.get("/nowhere", headers={"X-Request-Id": bad}).headers["x-request-id"]
        assert made != bad and len(made) == 32


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonLines())
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def lines() -> Iterator[list[str]]:
    root, handler = logging.getLogger(), Lines()
    root.addHandler(handler)
    logging.getLogger("memshare").setLevel(logging.INFO)
    yield handler.lines
    logging.getLogger("memshare").setLevel(logging.NOTSET)
    root.removeHandler(handler)


def test_log_tells_who_did_what_but_no_text_and_no_key(gated: TestClient, lines: list[str]) -> None:
    ann = Caller(gated, "ann", keep="read write")
    headers = {"X-Request-Id": "r-1"}
    words = {"prompt": "PLANTED", "answer": "PLANTED", "metadata": {"a": "PLANTED"}}
    body = {"items": [{"pool": "keep", **words}]}
    (result,) = ann("POST", "/v1/memories", json=body, headers=headers).json()["results"]
    ann.search("keep", "PLANTED")
    ann("GET", "/v1/memories?pool=PLANTED")
    ann("POST", f"/v1/memories/{result['id']}/feedback", json={"value": 2, "comment": "PLANTED"})
    chat = {"messages": [{"role": "user", "content": "PLANTED " * 2000}]}
    assert ann("POST", "/v1/chat/completions", json=chat).status_code == 400
    entries = [json.loads(line) for line in lines]
    first = next(entry for entry in entries if entry.get("request_id") == "r-1")
    assert (first["principal"], first["key"], first["status"]) == ("ann", ann.key.id, 201)
    assert (first["route"], first["method"]) == ("/v1/memories", "POST")
    assert first["seconds"] > 0
    assert len([entry for entry in entries if entry["message"] == "request"]) == 5
    text = "\n".join(lines)
    assert "PLANTED" not in text and ann.secret not in text
    assert ann.secret.removeprefix("ms-") not in text


def test_a_fault_is_logged_by_type_and_place(
    gated: TestClient, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("PLANTED")

    root = Caller(gated, "root", every="admin")
    gateway = gated.app.state.gateway  # type: ignore[attr-defined]
    monkeypatch.setattr(gateway.shared, "retrieve", broken)
    reply = root.search("keep", "PLANTED")
    assert reply.status_code == 500 and reply.json()["error"]["code"] == "internal_error"
    text = "\n".join(lines)
    assert reply.headers["x-request-id"] in text
    assert "KeyError at" in text and "test_access.py" in text and "PLANTED" not in text


def test_a_full_disk_is_named_but_not_what_was_to_be_written(
    tmp_path: Path, models: Path, lines: list[str]
) -> None:
    def full(_: object, cursor: Any, *__: object) -> None:
        cursor.execute("PRAGMA max_page_count = 1")  # as large as it is: no more

    with running(tmp_path, models) as client:
        engine = client.app.state.gateway.shared.store.database.engine  # type: ignore[attr-defined]
        event.listen(engine, "before_cursor_execute", full)
        item = {"pool": "keep", "prompt": "PLANTED " * 4000, "answer": "PLANTED"}
        reply = client.post("/v1/memories", json={"items": [item]})
        event.remove(engine, "before_cursor_execute", full)
    assert reply.status_code == 503 and reply.json()["error"]["code"] == "pool_unavailable"
    text = "\n".join(lines)
    assert "disk is full" in text and "PLANTED" not in text and "PLANTED" not in reply.text


def test_keys_stay_known_for_figures_alone_and_not_for_long(
    gated: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, fresh = Caller(gated, "root", every="admin"), Caller(gated, "fresh", every="admin")
    assert root("GET", "/metrics").status_code == 200
    state: Any = gated.app
    ring = state.state.gateway.access._ring
    find = ring.find

    def away(_: str) -> None:
        raise PoolUnavailable("connection refused")

    monkeypatch.setattr(access, "TRUST_SECONDS", 0.0)
    monkeypatch.setattr(ring, "find", away)
    assert root("GET", "/metrics").status_code == 200
    for reply in (root("GET", "/v1/models"), fresh("GET", "/metrics")):
        assert reply.status_code == 503 and reply.headers["retry-after"]
    with monkeypatch.context() as later:
        later.setattr(access, "AWAY_SECONDS", 0.0)
        assert root("GET", "/metrics").status_code == 503
    monkeypatch.setattr(ring, "find", lambda _: None)  # back, and the key was revoked
    assert root("GET", "/metrics").status_code == 401
    monkeypatch.setattr(ring, "find", away)
    assert root("GET", "/metrics").status_code == 503
    monkeypatch.setattr(ring, "find", find)
    assert root("GET", "/metrics").status_code == 200


def test_figures_wait_for_the_slowest_llm_and_not_for_one_after_the_other(
    gated: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    state: Any = gated.app
    together = asyncio.Barrier(2)

    class Slow:
        async def state(self) -> str:
            await asyncio.wait_for(together.wait(), 5)
            return "unreachable: asleep"

    monkeypatch.setattr(state.state.gateway, "probes", {"agent": Slow(), "scorer": Slow()})
    told = Caller(gated, "root", every="read")("GET", "/metrics")
    assert 'memshare_llm_up{llm="scorer"} 0.0' in told.text
