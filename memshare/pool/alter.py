"""The transactions that change one memory: delete, hold, release, amend.

Each returns the memory's pool, or None where nothing changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from memshare.pool.errors import InvalidMemory
from memshare.pool.limits import forget
from memshare.pool.rows import ALIVE, need_pool
from memshare.pool.schema import changes, copies, feedback, memories, pools, uses
from memshare.pool.validate import check_metadata, now
from memshare.records import ChangeKind


def delete(connection: sa.Connection, id: str, heir: str | None = None) -> str | None:
    """Erase a living memory's text, and what others said of it, which may quote the text.

    ``heir``: a living memory that takes its place, and takes over feedback, uses and copies; the
    caller holds `USES_LOCK` then.
    """
    erased: dict[str, Any] = {
        "prompt": "", "answer": "", "metadata": {}, "content_key": None, "held": False,
        "hold_reason": None, "deleted_at": now(),
    }  # fmt: skip
    agent = connection.execute(sa.select(memories.c.agent).where(memories.c.id == id)).scalar()
    pool = _change(connection, id, "delete", ALIVE, erased)
    if pool is not None:
        if heir is not None:
            _inherit(connection, id, heir)
        connection.execute(sa.delete(feedback).where(feedback.c.memory_id == id))
        connection.execute(sa.delete(uses).where(uses.c.memory_id == id))
        forget(connection, pool, id, agent)
    return pool


def hold(connection: sa.Connection, id: str, reason: str | None) -> str | None:
    """Put a living memory on hold."""
    values = {"held": True, "hold_reason": reason}
    return _change(connection, id, "hold", sa.and_(ALIVE, ~memories.c.held), values)


def release(connection: sa.Connection, id: str) -> str | None:
    """End a hold."""
    values = {"held": False, "hold_reason": None}
    return _change(connection, id, "release", sa.and_(ALIVE, memories.c.held), values)


def amend(
    connection: sa.Connection, id: str, metadata: Mapping[str, Any], max_chars: int
) -> str | None:
    """Give a living memory the ``metadata`` that it lacks, unless that makes too much of it."""
    memory = sa.select(memories.c.pool, memories.c.metadata).where(memories.c.id == id, ALIVE)
    row = connection.execute(memory).one_or_none()
    if row is None:
        return None
    need_pool(connection, row.pool, lock=True)  # others may be giving it theirs
    row = connection.execute(memory).one_or_none()
    if row is None:
        return None
    both = {**metadata, **row.metadata}
    try:
        check_metadata(both, max_chars)
    except InvalidMemory:
        return None
    if both == row.metadata:
        return None
    return _change(connection, id, "amend", ALIVE, {"metadata": both})


def metadata_of(connection: sa.Connection, id: str) -> dict[str, Any]:
    """A living memory's metadata, which nobody changes until the transaction's end; else none."""
    memory = sa.select(memories.c.pool, memories.c.metadata).where(memories.c.id == id, ALIVE)
    row = connection.execute(memory).one_or_none()
    if row is None:
        return {}
    need_pool(connection, row.pool, lock=True)
    row = connection.execute(memory).one_or_none()
    return {} if row is None else dict(row.metadata)


def _inherit(connection: sa.Connection, id: str, heir: str) -> None:
    """What is known of memory ``id`` is known of ``heir`` from now on, but its author's own vote.

    Opinions and origin that ``heir`` has of its own already stay. The caller holds `USES_LOCK`.
    """
    author = sa.select(memories.c.agent).where(memories.c.id == heir)
    # Locked, as `Feedback.give` does it: one principal's opinions of both come one after the other.
    found = connection.execute(author.with_for_update()).one()
    voted = sa.select(feedback.c.principal).where(feedback.c.memory_id == heir)
    connection.execute(
        sa.update(feedback)
        .where(
            feedback.c.memory_id == id,
            feedback.c.principal.not_in(voted),
            feedback.c.principal != (found.agent or ""),
        )
        .values(memory_id=heir)
    )
    if count := connection.execute(sa.select(uses.c.count).where(uses.c.memory_id == id)).scalar():
        more = sa.update(uses).where(uses.c.memory_id == heir).values(count=uses.c.count + count)
        if connection.execute(more).rowcount == 0:
            connection.execute(sa.insert(uses).values(memory_id=heir, count=count))
    connection.execute(
        sa.delete(copies).where(copies.c.memory_id == heir, copies.c.origin_id == id)
    )
    origin, own = (
        connection.execute(sa.select(copies.c.origin_id).where(copies.c.memory_id == one)).scalar()
        for one in (id, heir)
    )
    if own is None and origin not in (None, heir):
        connection.execute(sa.insert(copies).values(memory_id=heir, origin_id=origin))
        own = origin
    connection.execute(
        sa.update(copies).where(copies.c.origin_id == id).values(origin_id=own or heir)
    )


def _change(
    connection: sa.Connection,
    id: str,
    kind: ChangeKind,
    condition: sa.ColumnElement[bool],
    values: dict[str, Any],
) -> str | None:
    pool = connection.execute(sa.select(memories.c.pool).where(memories.c.id == id)).scalar()
    if pool is None:
        return None
    need_pool(connection, pool, lock=True)
    done = connection.execute(
        sa.update(memories).where(memories.c.id == id, condition).values(**values)
    )
    if done.rowcount == 0:
        return None
    seq = connection.execute(
        sa.update(pools)
        .where(pools.c.name == pool)
        .values(last_seq=pools.c.last_seq + 1)
        .returning(pools.c.last_seq)
    ).scalar_one()
    connection.execute(sa.insert(changes).values(pool=pool, seq=seq, kind=kind, memory_id=id))
    return str(pool)
