"""Who calls, and what they may do.

Every route but the health checks asks `Access.admit` for the caller before it reads the body. What
a caller may not read does not exist for it: a pool that no right is granted on is a 403 whether it
is there or not, and a memory there is a 404.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import HTTPBearer

from memshare.config import GatewayConfig
from memshare.gateway.errors import ApiError
from memshare.gateway.local import foreign
from memshare.gateway.metrics import Metrics
from memshare.pool.errors import PoolUnavailable, UnknownPool
from memshare.pool.keys import LOCAL_KEY, SECRET, SECRET_PREFIX, Key, KeyRing, Right
from memshare.sharing import SharedMemory

TRUST_SECONDS = 2.0  # a revoked key is refused everywhere after so long
AWAY_SECONDS = 600.0  # but for reading figures while nobody can ask the database
_ANSWER_SECONDS = 2.0  # then it is taken for away, where that matters
_WINDOW_SECONDS = 60.0
_REMEMBERED = 10_000


class Access:
    """Admits callers: checks their keys and holds them to their rate."""

    def __init__(self, shared: SharedMemory, metrics: Metrics, required: bool) -> None:
        """``required`` False: who shows no key of ours is the local principal, free to do all.

        Such a caller must be on this machine; see `foreign`.
        """
        self._shared = shared
        self._shed = metrics.shed.labels("rate")
        self._ring = KeyRing(shared.store.database)
        self._config: GatewayConfig = shared.config.gateway
        self._required = required
        self._seen: dict[str, tuple[float, Key | None]] = {}
        self._recent: dict[str, deque[float]] = {}

    async def admit(self, request: Request, when_away: bool = False) -> Key:
        """The caller's key; `ApiError` 401 without a valid one, 429 beyond its rate.

        403 for one without a key that isn't on this machine, or is a web page from elsewhere.
        Raises `PoolUnavailable` while the database can't be asked whether the key still holds;
        ``when_away``: only if it hasn't been asked for `AWAY_SECONDS`.
        """
        scheme, _, secret = request.headers.get("authorization", "").partition(" ")
        secret = secret.strip() if scheme.lower() == "bearer" else ""
        # Clients that must send something send "none" or the like where no key is needed.
        if not self._required and not secret.startswith(SECRET_PREFIX):
            if header := foreign(request.headers):
                raise ApiError(
                    403,
                    f"without a key only this machine is served, and no web page from elsewhere: "
                    f"this request has {header}. Use http://127.0.0.1 and the gateway's port; or "
                    "send Authorization: Bearer KEY (memshare keys create makes one)",
                    code="not_local",
                )
            key: Key | None = LOCAL_KEY
        else:
            key = await self._find(secret, when_away)
        if key is None:
            raise ApiError(
                401,
                "this key is unknown or was revoked"
                if secret
                else "a key is needed: send "
                "Authorization: Bearer KEY (memshare keys create makes one)",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        request.state.caller = key
        self._count(key)
        return key

    def max_body_bytes(self, key: Key) -> int:
        """How large a body of this caller may be."""
        return key.max_body_bytes or self._config.max_body_bytes

    async def _find(self, secret: str, when_away: bool) -> Key | None:
        if not SECRET.fullmatch(secret):  # it may be as long as a header may
            return None
        now = time.monotonic()
        at, known = self._seen.get(secret, (-math.inf, None))
        if now - at <= TRUST_SECONDS:
            return known
        asked = self._shared.read(self._ring.find, secret)
        if when_away and known is not None and now - at <= AWAY_SECONDS:
            try:
                key = await asyncio.wait_for(asked, _ANSWER_SECONDS)
            except (PoolUnavailable, TimeoutError):
                return known
        else:
            key = await asked
        if len(self._seen) >= _REMEMBERED:  # of made-up keys, most likely
            self._seen.clear()
        self._seen[secret] = (now, key)
        return key

    def _count(self, key: Key) -> None:
        """Count one request in the minute that ends now; refused ones don't count."""
        limit = key.requests_per_minute or self._config.requests_per_minute
        if limit is None:
            return
        now = time.monotonic()
        recent = self._recent.setdefault(key.id, deque())
        while recent and now - recent[0] >= _WINDOW_SECONDS:
            recent.popleft()
        if len(recent) >= limit:
            self._shed.inc()
            wait = max(1, math.ceil(recent[0] + _WINDOW_SECONDS - now))
            raise ApiError(
                429,
                f"this key may send {limit} requests a minute; again in {wait} s",
                code="rate_limited",
                headers={"Retry-After": str(wait)},
            )
        recent.append(now)


def need(caller: Key, right: Right, pool: str, param: str = "pool") -> None:
    """`ApiError` 403 unless ``caller`` has ``right`` in ``pool``."""
    if not caller.may(right, pool):
        message = f"this key has no {right} right on pool {pool!r}"
        raise ApiError(403, message, param=param, code="forbidden")


async def known_pool(
    shared: SharedMemory, caller: Key, pool: str, *rights: Right, param: str = "pool"
) -> None:
    """As `need` for each of ``rights``, and 404 if there is no such pool."""
    for right in rights:
        need(caller, right, pool, param)
    try:
        await shared.know(pool)
    except UnknownPool as error:
        raise ApiError(404, f"no pool {pool!r}", param=param, code="unknown_pool") from error


_bearer = HTTPBearer(auto_error=False, description="a key made by `memshare keys create`")


async def _caller(request: Request, _: Annotated[object, Security(_bearer)]) -> Key:
    key: Key = request.state.caller  # from `StrictRoute`
    return key


Caller = Annotated[Key, Depends(_caller)]
