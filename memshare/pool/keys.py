"""Bearer keys: who a caller is, and what it may do in which pool.

A key is 256 random bits. The database has its SHA-256 alone: for a secret that nobody can guess a
fast hash is as good as a slow one. So a key is shown once, when it is made.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import sqlalchemy as sa

from memshare.pool.engine import Database
from memshare.pool.errors import PoolError
from memshare.pool.ids import new_id
from memshare.pool.schema import keys
from memshare.pool.validate import check_pool_name, now

Right = Literal["read", "write", "admin"]
RIGHTS: tuple[Right, ...] = get_args(Right)
EVERY_POOL = "*"
LOCAL = "local"
SECRET_PREFIX = "ms-"
SECRET = re.compile(SECRET_PREFIX + r"[A-Za-z0-9_-]{43}")  # what a secret can be


@dataclass(frozen=True, slots=True)
class Key:
    """A key without its secret. ``rights``: pool, or ``*`` for every pool, to what is allowed.

    ``requests_per_minute`` and ``max_body_bytes`` None: as the gateway's configuration says.
    """

    id: str
    principal: str
    rights: Mapping[str, Collection[Right]]
    requests_per_minute: int | None = None
    max_body_bytes: int | None = None
    created_at: str = ""
    revoked_at: str | None = None

    def may(self, right: Right, pool: str) -> bool:
        """Whether it has ``right`` in ``pool``; ``admin`` has the other two with it."""
        granted = {*self.rights.get(pool, ()), *self.rights.get(EVERY_POOL, ())}
        return right in granted or "admin" in granted


# Whoever reaches a gateway that asks for no keys.
LOCAL_KEY = Key(id=LOCAL, principal=LOCAL, rights={EVERY_POOL: RIGHTS})


class KeyRing:
    """The keys of one database. Thread-safe; several processes may share the database."""

    def __init__(self, database: Database) -> None:
        """See `PoolStore.database`."""
        self._db = database

    def create(
        self,
        principal: str,
        rights: Mapping[str, Collection[Right]],
        requests_per_minute: int | None = None,
        max_body_bytes: int | None = None,
    ) -> tuple[Key, str]:
        """A new key and its secret, which nobody can read again.

        Raises `InvalidMemory` (an unusable name) and `PoolError` (no rights, or unknown ones).
        """
        if check_pool_name(principal, "principal") == LOCAL:
            raise PoolError(f"{LOCAL!r} is who needs no key; name the principal otherwise")
        for pool, granted in rights.items():
            check_pool_name(pool)
            if not granted or not set(granted) <= set(RIGHTS):
                raise PoolError(f"rights on {pool}: some of {', '.join(RIGHTS)} expected")
        if not rights:
            raise PoolError("a key without rights is of no use; name a pool, or * for every pool")
        for name, limit in (
            ("requests a minute", requests_per_minute),
            ("bytes of a body", max_body_bytes),
        ):
            if limit is not None and not 0 < limit < 2**31:
                raise PoolError(f"{name}: {limit} is no limit")
        secret = SECRET_PREFIX + secrets.token_urlsafe(32)
        row: dict[str, Any] = {
            "id": new_id(),
            "principal": principal,
            "rights": {pool: sorted(set(granted)) for pool, granted in rights.items()},
            "requests_per_minute": requests_per_minute,
            "max_body_bytes": max_body_bytes,
            "created_at": now(),
        }
        with self._db.write() as connection:
            connection.execute(sa.insert(keys).values(hash=_hash(secret), **row))
        return Key(**row), secret

    def find(self, secret: str) -> Key | None:
        """The key with this secret; None if there is none or it was revoked."""
        wanted = sa.and_(keys.c.hash == _hash(secret), keys.c.revoked_at.is_(None))
        with self._db.read() as connection:
            row = connection.execute(sa.select(keys).where(wanted)).one_or_none()
        return None if row is None else _key(row)

    def list(self) -> list[Key]:
        """Every key, the oldest first, revoked ones too."""
        with self._db.read() as connection:
            return [_key(row) for row in connection.execute(sa.select(keys).order_by(keys.c.id))]

    def revoke(self, id: str) -> bool:
        """End a key; False if it is unknown or was revoked before."""
        with self._db.write() as connection:
            done = connection.execute(
                sa.update(keys)
                .where(keys.c.id == id, keys.c.revoked_at.is_(None))
                .values(revoked_at=now())
            )
            return done.rowcount > 0


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def _key(row: Any) -> Key:
    return Key(
        row.id, row.principal, row.rights, row.requests_per_minute, row.max_body_bytes,
        row.created_at, row.revoked_at,
    )  # fmt: skip
