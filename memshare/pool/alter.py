"""The transactions that change one memory: delete, hold, release.

Each returns the memory's pool, or None where nothing changed.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from memshare.pool.limits import forget
from memshare.pool.rows import ALIVE, need_pool
from memshare.pool.schema import changes, feedback, memories, pools, uses
from memshare.pool.validate import now
from memshare.records import ChangeKind


def delete(connection: sa.Connection, id: str) -> str | None:
    """Erase a living memory's text, and what others said of it, which may quote the text."""
    erased: dict[str, Any] = {
        "prompt": "", "answer": "", "metadata": {}, "content_key": None, "held": False,
        "hold_reason": None, "deleted_at": now(),
    }  # fmt: skip
    agent = connection.execute(sa.select(memories.c.agent).where(memories.c.id == id)).scalar()
    pool = _change(connection, id, "delete", ALIVE, erased)
    if pool is not None:
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
