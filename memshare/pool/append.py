"""The appending transaction of one pool."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import sqlalchemy as sa

from memshare.pool.ids import new_id
from memshare.pool.schema import changes, memories, pools
from memshare.records import AppendResult, NewMemory, content_key

_KEYS_PER_QUERY = 500


def append_to_pool(
    connection: sa.Connection, pool: str, new: Sequence[NewMemory]
) -> list[AppendResult]:
    """Append checked memories to ``pool``, whose row the caller has locked; results in order."""
    keys = [content_key(pool, memory.prompt, memory.answer) for memory in new]
    there = _present(connection, pool, keys)
    first: dict[str, int] = {}  # key -> place of the memory that brings it
    for place, key in enumerate(keys):
        if key not in there:
            first.setdefault(key, place)
    seq = connection.execute(
        sa.update(pools)
        .where(pools.c.name == pool)
        .values(last_seq=pools.c.last_seq + len(first))
        .returning(pools.c.last_seq)
    ).scalar_one() - len(first)
    taken = _taken_ids(connection, (new[place].id for place in first.values()))
    rows = []
    log = []
    for key, place in first.items():
        memory = new[place]
        seq += 1
        if memory.id is None or memory.id in taken:
            id = new_id()
        else:
            id = memory.id
            taken.add(id)
        there[key] = (id, seq)
        rows.append(
            {
                "id": id,
                "pool": pool,
                "seq": seq,
                "content_key": key,
                "prompt": memory.prompt,
                "answer": memory.answer,
                "score": memory.score,
                "agent": memory.agent,
                "model": memory.model,
                "created_at": memory.created_at,
                "metadata": memory.metadata,
                "held": False,
            }
        )
        log.append({"pool": pool, "seq": seq, "kind": "add", "memory_id": id})
    if rows:
        connection.execute(sa.insert(memories), rows)
        connection.execute(sa.insert(changes), log)
    return [
        AppendResult(
            there[key][0], "stored" if first.get(key) == place else "duplicate", there[key][1]
        )
        for place, key in enumerate(keys)
    ]


def _present(
    connection: sa.Connection, pool: str, keys: Sequence[str]
) -> dict[str, tuple[str, int]]:
    """Content key to (id, seq) of those that the pool has."""
    found: dict[str, tuple[str, int]] = {}
    for start in range(0, len(keys), _KEYS_PER_QUERY):
        rows = connection.execute(
            sa.select(memories.c.content_key, memories.c.id, memories.c.seq).where(
                memories.c.pool == pool,
                memories.c.content_key.in_(keys[start : start + _KEYS_PER_QUERY]),
            )
        )
        found.update((key, (id, seq)) for key, id, seq in rows)
    return found


def _taken_ids(connection: sa.Connection, wanted: Iterable[str | None]) -> set[str]:
    """Those ids that a memory, living or deleted, in any pool has or had."""
    ids = [id for id in wanted if id is not None]
    taken: set[str] = set()
    for start in range(0, len(ids), _KEYS_PER_QUERY):
        part = ids[start : start + _KEYS_PER_QUERY]
        taken.update(connection.scalars(sa.select(memories.c.id).where(memories.c.id.in_(part))))
    return taken
