"""Keys: shown once, known by their hash, with rights per pool; and the command that makes them."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from memshare.cli import main
from memshare.pool.errors import InvalidMemory, PoolError
from memshare.pool.keys import LOCAL_KEY, Key, KeyRing
from memshare.pool.store import PoolStore


@pytest.mark.parametrize(
    ("rights", "allowed"),
    [
        ({"main": ["read"]}, {("read", "main")}),
        ({"main": ["write"]}, {("write", "main")}),
        ({"main": ["admin"]}, {("read", "main"), ("write", "main"), ("admin", "main")}),
        ({"*": ["read"], "main": ["write"]}, {("read", "main"), ("write", "main"), ("read", "b")}),
        ({"main": []}, set()),
        ({"mai": ["admin"], "main2": ["admin"]}, set()),
    ],
)
def test_rights_are_per_pool(rights: dict[str, list[str]], allowed: set[tuple[str, str]]) -> None:
    key = Key("id", "ann", rights)  # type: ignore[arg-type]
    for right in ("read", "write", "admin"):
        for pool in ("main", "b"):
            assert key.may(right, pool) == ((right, pool) in allowed)  # type: ignore[arg-type]
    assert LOCAL_KEY.may("admin", "main")


def test_a_key_is_found_by_its_secret_until_it_is_revoked(url: str) -> None:
    with PoolStore.open(url) as store:
        ring = KeyRing(store.database)
        key, secret = ring.create("ann", {"main": ["read", "read"]}, 60, 1000)
        other, second = ring.create("ann", {"*": ["admin"]})
        assert secret != second and len(secret) > 40
        assert ring.find(secret) == key and ring.find(second) == other
        assert key.rights == {"main": ["read"]}
        assert (key.requests_per_minute, key.max_body_bytes) == (60, 1000)
        assert ring.find(secret[:-1]) is None and ring.find("") is None
        assert ring.find("ms-\udcff") is None  # what HTTP headers may hold
        assert ring.revoke(key.id) and not ring.revoke(key.id) and not ring.revoke("none")
        assert ring.find(secret) is None and ring.find(second) == other
        assert [(k.id, k.revoked_at is None) for k in ring.list()] == [
            (key.id, False),
            (other.id, True),
        ]


def test_the_database_does_not_hold_the_secret(tmp_path: Path) -> None:
    with PoolStore.open(f"sqlite:///{tmp_path}/pool.db") as store:
        _, secret = KeyRing(store.database).create("ann", {"main": ["read"]})
    with sqlite3.connect(tmp_path / "pool.db") as connection:
        dump = "\n".join(connection.iterdump())
    connection.close()
    assert "ann" in dump and secret not in dump and secret.removeprefix("ms-") not in dump


@pytest.mark.parametrize(
    ("principal", "rights", "limit", "complaint"),
    [
        ("local", {"main": ["read"]}, None, "needs no key"),
        (" ", {"main": ["read"]}, None, "principal: is empty"),
        ("a\n", {"main": ["read"]}, None, "principal: .*unprintable"),
        ("ann", {"a\n": ["read"]}, None, "pool: .*unprintable"),
        ("ann", {}, None, "without rights"),
        ("ann", {"main": []}, None, "read, write, admin"),
        ("ann", {"main": ["own"]}, None, "read, write, admin"),
        ("ann", {"main": ["read"]}, 0, "no limit"),
    ],
)
def test_what_can_be_no_key(
    url: str, principal: str, rights: dict[str, list[str]], limit: int | None, complaint: str
) -> None:
    with PoolStore.open(url) as store, pytest.raises((PoolError, InvalidMemory), match=complaint):
        KeyRing(store.database).create(principal, rights, limit)  # type: ignore[arg-type]


def test_the_command_creates_lists_and_revokes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{tmp_path}/pool.db"
    assert main(["keys", "create", "ann", "--url", url, "--right", "a=read"]) == 2
    assert "no pool database there" in capsys.readouterr().err
    PoolStore.open(url).close()
    rights = ["--right", "a=read,write", "--right", "x=y=read", "--right", "a=admin"]
    assert main(["keys", "create", "ann", "--url", url, *rights]) == 0
    out, err = capsys.readouterr()
    secret = out.strip()
    assert secret.startswith("ms-") and secret not in err and "no pool 'a'" in err
    assert main(["keys", "list", "--url", url, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["rights"] == {"a": ["admin", "read", "write"], "x=y": ["read"]}
    assert main(["keys", "list", "--url", url]) == 0
    line = capsys.readouterr().out
    assert "ann" in line and "a=admin,read,write" in line and secret not in line
    assert main(["keys", "revoke", shown["id"], "none", "--url", url]) == 2
    out, err = capsys.readouterr()
    assert out == f"{shown['id']} revoked\n" and "no living key none" in err
    assert main(["keys", "list", "--url", url]) == 0
    assert "revoked" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["keys", "revoke", "caf\udce9", "--url", url])
    assert "is no id" in capsys.readouterr().err
    for bad in (["--right", "a"], ["--right", "a=own"], []):
        assert main(["keys", "create", "ann", "--url", url, *bad]) == 2
