"""From rows of the database to records, and the queries that several methods share."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa

from memshare.pool.errors import PoolError, UnknownPool
from memshare.pool.schema import memories, pools
from memshare.records import Memory, PoolInfo

ALIVE = memories.c.deleted_at.is_(None)
_VALUES_PER_QUERY = 500


def in_parts(values: Sequence[str]) -> Iterator[Sequence[str]]:
    """``values`` in order, as many at a time as one query is given."""
    for start in range(0, len(values), _VALUES_PER_QUERY):
        yield values[start : start + _VALUES_PER_QUERY]


def find_pool(connection: sa.Connection, name: str, lock: bool = False) -> PoolInfo | None:
    """The pool or None; ``lock`` keeps other writers off it until the transaction ends."""
    if not _possible(name):
        return None
    query = sa.select(pools).where(pools.c.name == name)
    # SQLite has no row locks and needs none: its writers are alone. The weaker kind of lock keeps
    # off writers alone, not those who put a decision about the pool on record.
    query = query.with_for_update(key_share=True) if lock else query
    row = connection.execute(query).one_or_none()
    return None if row is None else pool_info(row)


def _possible(name: str) -> bool:
    """Whether a database can be asked for it: PostgreSQL refuses NUL, and none has surrogates."""
    try:
        return b"\x00" not in name.encode()
    except UnicodeEncodeError:
        return False


def need_pool(connection: sa.Connection, name: str, lock: bool = False) -> PoolInfo:
    """As `find_pool`, but raises `UnknownPool` naming the pools that are there."""
    info = find_pool(connection, name, lock)
    if info is None:
        known = ", ".join(connection.scalars(sa.select(pools.c.name).order_by("name").limit(20)))
        raise UnknownPool(f"no pool {name!r} (there: {known or 'none'}); create it first")
    return info


def size_of(connection: sa.Connection, name: str) -> int:
    """How many living memories a pool has, held ones too: its row says so, none is counted."""
    size: int = connection.execute(sa.select(pools.c.size).where(pools.c.name == name)).scalar_one()
    return size


def pool_info(row: Any) -> PoolInfo:
    """A row of ``pools``."""
    return PoolInfo(row.name, row.rubric, row.threshold, row.last_seq)


def memory_of(row: Any) -> Memory:
    """A row of ``memories``."""
    return Memory(
        row.id, row.pool, row.prompt, row.answer, row.score, row.agent, row.model, row.created_at,
        row.metadata, row.seq, row.held, row.hold_reason,
    )  # fmt: skip


def page_of(
    connection: sa.Connection, pool: str, after: int, until: int, limit: int, held: bool | None
) -> list[Memory]:
    """Up to ``limit`` living memories with ``after < seq <= until``, in order.

    ``held``: only those on hold, only the others, or (None) both.
    """
    query = sa.select(memories).where(
        memories.c.pool == pool, memories.c.seq > after, memories.c.seq <= until, ALIVE
    )
    if held is not None:
        query = query.where(memories.c.held if held else ~memories.c.held)
    return [memory_of(r) for r in connection.execute(query.order_by(memories.c.seq).limit(limit))]


def span_end(connection: sa.Connection, pool: str, after: int, until: int, count: int) -> int:
    """The seq of the ``count``-th living, not held memory with ``after < seq <= until``, or it."""
    query = sa.select(memories.c.seq).where(
        memories.c.pool == pool, memories.c.seq > after, memories.c.seq <= until, ALIVE
    )
    query = query.where(~memories.c.held).order_by(memories.c.seq).offset(count - 1).limit(1)
    found = connection.scalar(query)
    return until if found is None else int(found)


def make_cursor(seq: int) -> str:
    """The opaque cursor of the page after ``seq``."""
    return base64.urlsafe_b64encode(b"s%d" % seq).decode().rstrip("=")


def read_cursor(cursor: str) -> int:
    """The seq in a cursor; raises `PoolError`."""
    try:
        text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode()
        if text[:1] != "s":
            raise ValueError
        return int(text[1:])
    except (ValueError, binascii.Error):
        raise PoolError(f"cursor: {cursor!r} is none of ours; start again without one") from None
