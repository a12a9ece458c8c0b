"""No route shows a caller anything of a pool that it may not read: no id, no text, no name."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.callers import Caller
from tests.unit.gateway.conftest import running

POOLS = ("keep", "strict", "private")
RIGHTS = ("read", "write", "admin")
CALLERS, REQUESTS = 15, 40


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def random_request(caller: Caller, rng: random.Random, ids: list[str], names: list[str]) -> Any:
    """One request of any kind that reads, about any pool and any memory."""
    pool, id_ = rng.choice([*POOLS, "nowhere"]), rng.choice(ids)
    text = rng.choice(names)
    search = {"pool": pool, "query": text, "k": rng.choice([1, 50])}
    write = rng.choice([{"write": True}, {"write": False}, {}])
    ask = {
        "messages": [{"role": "user", "content": text}],
        "memory": {"pool": pool, "shots": rng.choice([0, 0, 1, 5]), **write},
        "stream": rng.random() < 0.5,
        "max_tokens": 2,
    }
    there = f"SECRET{pool}0"  # the same content again: a duplicate, whose id is another's
    copy = {"pool": pool, "prompt": there, "answer": f"of {there}", "id": id_}
    requests: list[tuple[str, str, Any]] = [
        ("POST", "/v1/memories/search", search),
        ("POST", "/v1/memories/search", {**search, "filter": {"agent": "root"}}),
        ("GET", f"/v1/memories?pool={pool}&limit={rng.choice([1, 100])}", None),
        ("GET", f"/v1/memories?pool={pool}&cursor=czI", None),  # a cursor of another pool
        ("GET", f"/v1/memories/{id_}", None),
        ("GET", f"/v1/memories?pool={pool}&held=true", None),
        ("POST", f"/v1/memories/{id_}/feedback", {"value": "up"}),
        ("POST", f"/v1/memories/{id_}/hold", {"reason": "odd"}),  # a name would be the holder's own
        ("POST", f"/v1/memories/{id_}/release", None),
        ("POST", "/v1/chat/completions", ask),
        ("POST", "/v1/memories", {"items": [copy], "import": rng.random() < 0.3}),
        ("GET", "/v1/retrievers/main/generations", None),
        ("GET", "/v1/models", None),
        ("GET", "/metrics", None),
    ]
    method, path, body = rng.choice(requests)
    return caller(method, path, json=body)


def test_random_rights_over_every_route_show_nothing_foreign(
    tmp_path: Path, models: Path, url: str
) -> None:
    rng = random.Random(4)
    sections: dict[str, Any] = {"pools": {pool: {"threshold": 100} for pool in POOLS}}
    sections["database_url"] = url
    callers = CALLERS if url.startswith("sqlite") else CALLERS // 3
    with running(tmp_path, models, keys_required=True, **sections) as client:
        root = Caller(client, "root", every="admin")
        home: dict[str, str] = {}
        for pool in POOLS:
            for number in range(6):
                name = f"SECRET{pool}{number}"
                id_ = root.add(pool, name).json()["results"][0]["id"]
                home |= {id_: pool, name: pool}
        ids = [key for key in home if not key.startswith("SECRET")]
        names = [key for key in home if key.startswith("SECRET")]
        shown, statuses = 0, set()
        for number in range(callers):
            rights = {
                pool: " ".join(rng.sample(RIGHTS, rng.randint(1, 2)))
                for pool in rng.sample([*POOLS, "nowhere"], rng.randint(1, 3))
            }
            caller = Caller(client, f"agent {number}", **rights)
            foreign = {key for key, pool in home.items() if not caller.key.may("read", pool)}
            for _ in range(REQUESTS):
                # What it asks with is its own; what comes back must not be foreign.
                asked = rng.choice(names)
                reply = random_request(caller, rng, ids, [asked])
                statuses.add(reply.status_code)
                if reply.status_code == 404 and "unknown_pool" in reply.text:
                    # Told that there is none: only who has a right on that name.
                    assert caller.key.rights.get("nowhere"), (rights, reply.request.content)
                sent = reply.request.content.decode() + str(reply.request.url)
                leaked = {key for key in foreign if key in reply.text and key not in sent}
                assert not leaked, (rights, reply.request.url, sent, reply.text)
                shown += sum(key in reply.text for key in set(home) - foreign)
                for pool in POOLS:
                    if pool not in rights and pool not in sent:
                        assert f'"{pool}"' not in reply.text
        assert shown > 6 * callers and {200, 403, 404} <= statuses  # it was no test of closed doors
