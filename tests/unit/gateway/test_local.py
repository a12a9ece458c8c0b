"""Without a key only this machine is served: no web page acts as `local`, by whatever name."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

from tests.callers import Caller

HERE = ["localhost", "LocalHost:8000", "127.0.0.1", "127.0.0.1:1", "127.1.2.3", "[::1]", "[::1]:80"]
ELSEWHERE = [
    "", "evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example:80",
    "0.0.0.0:8000", "10.0.0.1", "[2001:db8::1]", "[::1", "127.0.0.1@evil.example",
]  # fmt: skip


@pytest.mark.parametrize("host", HERE)
def test_names_of_this_machine_are_served(client: TestClient, host: str) -> None:
    for headers in ({"Host": host}, {"Host": host, "Origin": f"http://{host}"}):
        reply = client.get("/v1/memories?pool=keep", headers=headers)
        assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("host", ELSEWHERE)
def test_any_other_host_is_refused(client: TestClient, host: str) -> None:
    """A page whose own name was made to lead here would read, write and erase as `local`."""
    reply = client.get("/v1/memories?pool=keep", headers={"Host": host})
    assert reply.status_code == 403, reply.text
    error = reply.json()["error"]
    assert (error["type"], error["code"]) == ("permission_error", "not_local")
    assert f"Host {host!r}" in error["message"] and "memshare keys create" in error["message"]
    assert client.get("/healthz", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["null", *(f"https://{name}" for name in ELSEWHERE)])
def test_a_web_page_from_elsewhere_changes_nothing(client: TestClient, origin: str) -> None:
    """A browser sends a POST without a body for any page, and asks nobody first."""
    item = {"pool": "keep", "prompt": f"from {origin}?", "answer": "held"}
    (added,) = client.post("/v1/memories", json={"items": [item]}).json()["results"]
    path = f"/v1/memories/{added['id']}"
    assert client.post(f"{path}/hold", json={}).json()["held"]
    for act in (f"{path}/release", "/v1/retrievers/main/generations/0/activate"):
        reply = client.post(act, headers={"Origin": origin})
        assert reply.status_code == 403, reply.text
        assert f"Origin {origin!r}" in reply.json()["error"]["message"]
    held = client.get("/v1/memories?pool=keep&held=true").json()["memories"]
    assert added["id"] in [memory["id"] for memory in held]


def test_with_a_key_hosts_and_origins_do_not_matter(client: TestClient) -> None:
    ann = Caller(client, "ann", keep="read")
    headers = {"Host": "memories.example", "Origin": "https://app.example"}
    assert ann("GET", "/v1/memories?pool=keep", headers=headers).status_code == 200
