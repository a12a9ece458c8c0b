"""Memories over HTTP, on real parts in one process."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from memshare.retrieval.searcher import Searcher
from tests.unit.gateway.conftest import running


def add(client: TestClient, *items: dict[str, Any], pool: str = "keep") -> Any:
    body = {"items": [{"pool": pool, **item} for item in items]}
    return client.post("/v1/memories", json=body)


def test_added_memory_is_found_read_listed_and_deleted(client: TestClient) -> None:
    reply = add(client, {"prompt": "red apples", "answer": "sweet", "metadata": {"n": [1, None]}})
    assert reply.status_code == 201
    (result,) = reply.json()["results"]
    assert (result["status"], result["reason"]) == ("stored", None)
    search = {"pool": "keep", "query": "red apples", "k": 1}
    found = client.post("/v1/memories/search", json=search).json()
    assert found["generation"] == 0
    (memory,) = found["memories"]
    assert memory.pop("similarity") > 0.5
    assert memory["id"] == result["id"]
    assert (memory["prompt"], memory["answer"]) == ("red apples", "sweet")
    assert memory["metadata"] == {"n": [1, None]}
    assert client.get(f"/v1/memories/{result['id']}").json() == memory
    assert memory in client.get("/v1/memories?pool=keep&limit=1000").json()["memories"]
    gone = client.delete(f"/v1/memories/{result['id']}")
    assert gone.json() == {"id": result["id"], "deleted": True}
    assert client.get(f"/v1/memories/{result['id']}").status_code == 404
    assert client.delete(f"/v1/memories/{result['id']}").status_code == 404
    again = client.post("/v1/memories/search", json={**search, "k": 1000}).json()
    assert result["id"] not in [memory["id"] for memory in again["memories"]]


def test_provenance_is_not_the_clients_to_claim(client: TestClient) -> None:
    claimed = {"id": "mine", "score": 100, "agent": "admin", "created_at": "1999-01-01"}
    item = {"prompt": "who wrote this", "answer": "me", "model": "m", **claimed}
    (result,) = add(client, item).json()["results"]
    memory = client.get(f"/v1/memories/{result['id']}").json()
    assert (memory["score"], memory["agent"], memory["model"]) == (None, "local", "m")
    assert memory["id"] != "mine" and memory["created_at"] > "2020"


def test_writes_that_wait_to_be_searchable_hold_nothing_else_up(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searchable = threading.Event()
    monkeypatch.setattr(Searcher, "wait_visible", lambda *_: searchable.wait(20))
    with (
        running(tmp_path, models, gateway={"threads": 2}) as client,
        ThreadPoolExecutor(4) as clients,
    ):
        items = [{"prompt": f"stalled {number}", "answer": "one"} for number in range(4)]
        stalled = [clients.submit(add, client, item) for item in items]
        try:
            while not (found := client.get("/v1/memories?pool=keep").json()["memories"]):
                time.sleep(0.02)
            began = time.monotonic()
            deleted = client.delete(f"/v1/memories/{found[0]['id']}")
            question = {"messages": [{"role": "user", "content": "q"}], "memory": {"shots": 0}}
            said = client.post("/v1/chat/completions", json={**question, "max_tokens": 1})
            assert time.monotonic() - began < 10
        finally:
            searchable.set()
        assert (deleted.status_code, said.status_code) == (200, 200)
        assert [one.result().status_code for one in stalled] == [201] * 4


def test_a_pool_outside_the_retriever_is_kept_apart_from_one_that_is_not_there(
    tmp_path: Path, models: Path
) -> None:
    with running(tmp_path, models, retriever={"pools": ["keep"]}) as client:
        assert add(client, {"prompt": "p", "answer": "a"}, pool="strict").status_code == 201
        assert len(client.get("/v1/memories?pool=strict").json()["memories"]) == 1
        question = {"messages": [{"role": "user", "content": "q"}]}
        for pool, code in (("strict", "pool_not_served"), ("nowhere", "unknown_pool")):
            search = {"pool": pool, "query": "p", "k": 1}
            for reply in (
                client.post("/v1/memories/search", json=search),
                client.post("/v1/chat/completions", json={**question, "memory": {"pool": pool}}),
            ):
                error = reply.json()["error"]
                assert (reply.status_code, error["code"]) == (404, code)
                assert ("retriever.pools" in error["message"]) is (pool == "strict")


def test_a_raised_limit_of_characters_holds_for_every_item(tmp_path: Path, models: Path) -> None:
    with running(tmp_path, models, gateway={"max_text_chars": 50_000}) as client:
        items = [{"prompt": "short", "answer": "one"}, {"prompt": "long", "answer": "x" * 40_000}]
        reply = add(client, *items, {"prompt": "longer", "answer": "x" * 50_001})
        assert reply.status_code == 201, reply.text
        found = [result["status"] for result in reply.json()["results"]]
        assert found == ["stored", "stored", "rejected"]


def test_each_item_has_its_result_and_reason(client: TestClient) -> None:
    reply = add(
        client,
        {"prompt": "per item", "answer": "one"},
        {"prompt": " ", "answer": "one"},
        {"prompt": "PER  item", "answer": "ONE"},
        {"prompt": "nul", "answer": "a\x00b"},
        {"prompt": "long", "answer": "x" * 32_769},
    )
    assert reply.status_code == 201
    results = reply.json()["results"]
    statuses = [result["status"] for result in results]
    assert statuses == ["stored", "rejected", "duplicate", "rejected", "rejected"]
    assert results[2]["id"] == results[0]["id"]
    reasons = [results[place]["reason"] for place in (1, 3, 4)]
    for reason, word in zip(reasons, ("prompt: is empty", "NUL", "32769"), strict=True):
        assert word in reason


def test_nothing_storable_is_a_refusal(client: TestClient) -> None:
    reply = add(client, {"prompt": "", "answer": "x"})
    assert reply.status_code == 422
    assert "prompt: is empty" in reply.json()["error"]["message"]
    assert reply.json()["results"][0]["status"] == "rejected"


def test_unknown_pool_stores_nothing_at_all(client: TestClient) -> None:
    items = [
        {"pool": "keep", "prompt": "half of a batch", "answer": "x"},
        {"pool": "nowhere", "prompt": "half of a batch", "answer": "x"},
    ]
    reply = client.post("/v1/memories", json={"items": items})
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "unknown_pool"
    page = client.get("/v1/memories?pool=keep&limit=1000").json()
    assert "half of a batch" not in [memory["prompt"] for memory in page["memories"]]


def test_pages_hold_everything_once(tmp_path: Path, models: Path) -> None:
    with running(tmp_path, models) as client:
        add(client, *({"prompt": f"page {n}", "answer": "x"} for n in range(7)))
        seen: list[str] = []
        cursor: str | None = None
        while True:
            query = "" if cursor is None else f"&cursor={cursor}"
            page = client.get(f"/v1/memories?pool=keep&limit=3{query}").json()
            seen += [memory["prompt"] for memory in page["memories"]]
            cursor = page["next_cursor"]
            if cursor is None:
                break
        assert seen == [f"page {n}" for n in range(7)]
        everything = {"pool": "keep", "query": "page", "k": 1000}
        found = client.post("/v1/memories/search", json=everything).json()["memories"]
        assert len(found) == 7  # k larger than the pool: all there are
        empty = client.post("/v1/memories/search", json={**everything, "pool": "strict"})
        assert empty.json() == {"generation": 0, "memories": []}


def test_search_is_filtered(client: TestClient) -> None:
    add(client, {"prompt": "filter me", "answer": "x"})
    search = {"pool": "keep", "query": "filter me", "k": 1}

    def found(**restrict: str) -> int:
        reply = client.post("/v1/memories/search", json={**search, "filter": restrict})
        assert reply.status_code == 200, reply.text
        return len(reply.json()["memories"])

    assert found(agent="local") == 1
    assert found(agent="nobody") == 0
    assert found(created_after="2020-01-01") == 1
    assert found(created_before="2020-01-01T00:00:00Z") == 0


def test_search_is_filtered_by_metadata(client: TestClient) -> None:
    about = {"topic": "eggs", "tags": ["soft", 3], "checked": True}
    add(client, {"prompt": "metadata me", "answer": "x", "metadata": about})
    search = {"pool": "keep", "query": "metadata me", "k": 1}

    def found(**wanted: object) -> int:
        body = {**search, "filter": {"metadata": wanted}}
        reply = client.post("/v1/memories/search", json=body)
        return len(reply.json()["memories"]) if reply.status_code == 200 else -reply.status_code

    assert found(topic="eggs") == found(topic="eggs", checked=True, tags="soft") == 1
    assert found(tags=3) == found(tags=3.0) == 1
    assert found(topic="ham") == found(checked=1) == found(checked=False) == found(none="x") == 0
    assert found(topic="eggs", tags="hard") == 0
    assert found(topic=["eggs"]) == found(topic=None) == -422


def test_scored_writes_are_pending_until_the_scorer_decides(tmp_path: Path, models: Path) -> None:
    with running(tmp_path, models, gateway={"score_writes": True}) as client:
        kept = add(client, {"prompt": "a pair", "answer": "to grade"}, {"prompt": "", "answer": ""})
        assert kept.status_code == 202
        first, second = kept.json()["results"]
        assert (first["status"], first["id"], second["status"]) == ("pending", None, "rejected")
        add(client, {"prompt": "a pair", "answer": "to drop"}, pool="strict")
    with running(tmp_path, models) as client:  # a stop finishes what was accepted
        (memory,) = client.get("/v1/memories?pool=keep").json()["memories"]
        assert memory["prompt"] == "a pair" and 0 < memory["score"] < 100
        assert client.get("/v1/memories?pool=strict").json()["memories"] == []


def test_full_queue_refuses_scored_writes_and_chats_that_write(
    tmp_path: Path, models: Path
) -> None:
    away = {"backend": "vllm", "url": "http://127.0.0.1:9", "retries": 0}  # nobody grades
    gateway = {"score_writes": True, "scoring_queue": 3, "shutdown_seconds": 1}
    with running(tmp_path, models, gateway=gateway, scorer_llm=away) as client:
        many = [{"prompt": f"question {n}", "answer": "x"} for n in range(3)]
        assert add(client, *many).status_code == 202
        ask = {"messages": [{"role": "user", "content": "q"}]}
        for refused in (
            add(client, {"prompt": "one more", "answer": "x"}),
            client.post("/v1/chat/completions", json=ask),
        ):
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "queue_full"
            assert int(refused.headers["retry-after"]) > 0
        read_only = client.post("/v1/chat/completions", json={**ask, "memory": {"write": False}})
        assert read_only.status_code == 200
        text = client.get("/metrics").text
        assert "memshare_scoring_queue 3.0" in text
        assert 'memshare_shed_total{reason="queue"} 2.0' in text


def test_feedback_is_one_opinion_and_shows_on_the_memory(client: TestClient) -> None:
    (result,) = add(client, {"prompt": "how useful is this", "answer": "very"}).json()["results"]
    path = f"/v1/memories/{result['id']}"
    assert client.get(path).json()["standing"] == 0
    for value, standing in (("up", 1 / 3), (1, 1 / 3), ("down", -1 / 3), (-0.5, -1 / 6)):
        reply = client.post(f"{path}/feedback", json={"value": value, "comment": "because"})
        assert reply.status_code == 200, reply.text
        assert reply.json() == {"id": result["id"], "standing": pytest.approx(standing), "votes": 1}
    search = {"pool": "keep", "query": "how useful is this", "k": 1}
    (found,) = client.post("/v1/memories/search", json=search).json()["memories"]
    listed = client.get("/v1/memories?pool=keep&limit=1000").json()["memories"]
    (listed,) = [memory for memory in listed if memory["id"] == result["id"]]
    assert found["standing"] == listed["standing"] == pytest.approx(-1 / 6)
    for bad in ({}, {"value": "sideways"}, {"value": 1.5}, {"value": 1, "comment": ""}):
        assert client.post(f"{path}/feedback", json=bad).status_code == 422
    assert client.post("/v1/memories/none/feedback", json={"value": 1}).status_code == 404


EXPORTED = {
    "pool": "keep",
    "prompt": "from an export",
    "answer": "x",
    "id": "export-1",
    "score": 91,
    "agent": "ann",
    "created_at": "2020-01-02T03:04:05Z",
}


def test_an_admins_import_is_not_scored_again(tmp_path: Path, models: Path) -> None:
    with running(tmp_path, models, gateway={"score_writes": True}) as client:
        reply = client.post("/v1/memories", json={"import": True, "items": [EXPORTED]})
        assert reply.status_code == 201
        (result,) = reply.json()["results"]
        assert (result["id"], result["status"]) == ("export-1", "stored")
        memory = client.get("/v1/memories/export-1").json()
        assert (memory["score"], memory["created_at"][:4]) == (91, "2020")


def test_an_admins_import_brings_its_provenance(client: TestClient) -> None:
    item = EXPORTED
    body = {"import": True, "items": [item, {**item, "prompt": "bad", "score": "good"}]}
    first, second = client.post("/v1/memories", json=body).json()["results"]
    assert (first["id"], first["status"], second["status"]) == ("export-1", "stored", "rejected")
    memory = client.get("/v1/memories/export-1").json()
    assert (memory["score"], memory["agent"], memory["created_at"][:4]) == (91, "ann", "2020")
    again = client.post("/v1/memories", json={"items": [memory]})  # what was read can be sent
    assert again.json()["results"][0]["status"] == "duplicate"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/memories/nothing", 404),
        ("/v1/memories/a%00b", 422),
        ("/v1/memories/" + "x" * 65, 422),
        ("/v1/memories", 422),
        ("/v1/memories?pool=", 422),
        ("/v1/memories?pool=nowhere", 404),
        ("/v1/memories?pool=%00", 404),
        ("/v1/memories?pool=keep&limit=0", 422),
        ("/v1/memories?pool=keep&limit=1e9", 422),
        ("/v1/memories?pool=keep&cursor=nonsense", 422),
        ("/v1/memories?pool=keep&cursor=czk5OTk5OTk5OTk5OTk5OTk5OTk5OTk5OTk", 422),
        ("/v1/memories?pool=keep&cursor=%F0%9F%98%80", 422),
        ("/v1/retrievers/other/generations", 404),
    ],
)
def test_bad_reads(client: TestClient, path: str, status: int) -> None:
    reply = client.get(path)
    assert reply.status_code == status, reply.text
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
