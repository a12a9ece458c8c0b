"""Memories on hold, over HTTP: nobody is shown them, admins review them, everybody else can't."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.callers import Caller
from tests.unit.gateway.conftest import running


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def found(caller: Caller, query: str) -> list[str]:
    return [memory["id"] for memory in caller.search("keep", query).json()["memories"]]


def on_hold(admin: Caller) -> dict[str, str]:
    reply = admin("GET", "/v1/memories?pool=keep&held=true")
    assert reply.status_code == 200, reply.text
    return {memory["id"]: memory["hold_reason"] for memory in reply.json()["memories"]}


def test_what_is_on_hold_is_for_admins_and_its_author(tmp_path: Path, models: Path) -> None:
    pools = {"keep": {"threshold": 0, "hold_suspicious": True}}
    with running(tmp_path, models, keys_required=True, pools=pools) as client:
        root = Caller(client, "root", every="admin")
        ann = Caller(client, "ann", keep="read write")
        bob = Caller(client, "bob", keep="read write")
        (plain,) = ann.add("keep", "plain question").json()["results"]
        (odd,) = ann.add("keep", "plain question <|im_end|>").json()["results"]
        assert (plain["status"], odd["status"]) == ("stored", "held")
        assert "control strings" in odd["reason"]

        # 1. Nobody is shown it: not by search, not as a shot, not in pages, not by its id.
        for caller in (root, ann, bob):
            assert found(caller, "plain question") == [plain["id"]]
            shots = caller.chat(pool="keep", shots=5, write=False).json()["memshare"]["memories"]
            assert shots == [plain["id"]]
            page = caller("GET", "/v1/memories?pool=keep").json()["memories"]
            assert [memory["id"] for memory in page] == [plain["id"]]
        path = f"/v1/memories/{odd['id']}"
        seen = [caller("GET", path).status_code for caller in (root, ann, bob)]
        assert seen == [200, 200, 404]
        assert bob("POST", f"{path}/feedback", json={"value": "up"}).status_code == 404

        # 2. Admins review; others may not, not even their own.
        assert on_hold(root) == {odd["id"]: odd["reason"]}
        assert ann("GET", "/v1/memories?pool=keep&held=true").status_code == 403
        assert ann("POST", f"{path}/release").status_code == 403
        assert bob("POST", f"{path}/release").status_code == 404
        other = f"/v1/memories/{plain['id']}"
        assert bob("POST", f"{other}/hold", json={}).status_code == 403
        held = root("POST", f"{other}/hold", json={"reason": "looks wrong"})
        assert held.json() == {"id": plain["id"], "held": True}
        assert on_hold(root)[plain["id"]] == "looks wrong"
        released = root("POST", f"{path}/release")
        assert released.json() == {"id": odd["id"], "held": False}
        client.app.state.gateway.shared.searcher.wait_visible(  # type: ignore[attr-defined]
            "keep",
            client.app.state.gateway.shared.store.last_seq("keep"),
            20,  # type: ignore[attr-defined]
        )
        for caller in (root, bob):
            assert found(caller, "plain question") == [odd["id"]]
        assert bob("GET", path).status_code == 200 and bob("GET", other).status_code == 404
        assert root("DELETE", other).status_code == 200
        assert on_hold(root) == {}


def test_three_principals_put_a_memory_on_hold_and_one_does_not(
    tmp_path: Path, models: Path
) -> None:
    with running(tmp_path, models, keys_required=True) as client:
        root = Caller(client, "root", every="admin")
        voters = [Caller(client, name, keep="read write") for name in ("a", "b", "c")]
        (added,) = root.add("keep", "a question").json()["results"]
        path = f"/v1/memories/{added['id']}/feedback"
        for _ in range(3):  # however often
            assert voters[0]("POST", path, json={"value": "down"}).status_code == 200
        assert on_hold(root) == {}
        assert voters[1]("POST", path, json={"value": "down"}).json()["standing"] == -0.5
        assert on_hold(root) == {}
        assert voters[2]("POST", path, json={"value": "down"}).json()["standing"] == -0.6
        assert on_hold(root) == {added["id"]: "its standing is -0.60 after 3 votes"}
        assert voters[2]("POST", path, json={"value": "up"}).status_code == 404


def test_a_principals_share_is_refused_item_by_item(tmp_path: Path, models: Path) -> None:
    pools = {"keep": {"threshold": 0, "max_principal_share": 0.25, "principal_floor": 2}}
    with running(tmp_path, models, keys_required=True, pools=pools) as client:
        ann = Caller(client, "ann", keep="read write")
        root = Caller(client, "root", every="admin")
        items = [{"pool": "keep", "prompt": f"q {n}", "answer": "a"} for n in range(3)]
        reply = ann("POST", "/v1/memories", json={"items": items})
        assert reply.status_code == 201
        results = reply.json()["results"]
        assert [result["status"] for result in results] == ["stored", "stored", "rejected"]
        assert (
            results[2]["id"] is None and "as many as one principal may have" in results[2]["reason"]
        )
        full = ann("POST", "/v1/memories", json={"items": items[2:]})
        assert full.status_code == 422 and "as many as" in full.json()["error"]["message"]
        assert full.json()["results"][0]["status"] == "rejected"
        # An admin's import is nobody's share: it brings the provenance that it has.
        for item in items:
            item |= {"prompt": f"import {item['prompt']}", "agent": "ann"}
        done = root("POST", "/v1/memories", json={"items": items, "import": True})
        assert [result["status"] for result in done.json()["results"]] == ["stored"] * 3
