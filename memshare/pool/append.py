"""The appending transaction of one pool."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import sqlalchemy as sa

from memshare.pool.ids import new_id
from memshare.pool.limits import NO_LIMITS, Limits, Tally
from memshare.pool.rows import in_parts
from memshare.pool.schema import changes, memories, pools
from memshare.records import AppendResult, AppendStatus, NewMemory, content_key


def append_to_pool(
    connection: sa.Connection,
    pool: str,
    new: Sequence[NewMemory],
    limits: Limits = NO_LIMITS,
) -> list[AppendResult]:
    """Append checked memories to ``pool``, whose row the caller has locked; results in order."""
    keys = [content_key(pool, memory.prompt, memory.answer) for memory in new]
    there = _present(connection, pool, keys)
    taken = _taken_ids(connection, (memory.id for memory in new))
    tally = Tally(connection, pool, {m.agent for m in new if m.agent is not None}, limits)
    results: list[AppendResult | None] = []
    accepted: list[tuple[int, str]] = []  # place, id
    for place, (key, memory) in enumerate(zip(keys, new, strict=True)):
        if key in there:
            results.append(None)  # a duplicate, perhaps of one whose seq is not known yet
            continue
        if refusal := tally.refuse(memory):
            results.append(AppendResult(refusal.id, "rejected", 0, refusal.reason))
            continue
        id = new_id() if memory.id is None or memory.id in taken else memory.id
        taken.add(id)
        there[key] = (id, 0)
        tally.add(memory, id)
        accepted.append((place, id))
        results.append(None)
    seq = _take_seqs(connection, pool, len(accepted))
    rows = []
    for place, id in accepted:
        memory, key = new[place], keys[place]
        seq += 1
        there[key] = (id, seq)
        status: AppendStatus = "stored" if memory.hold is None else "held"
        results[place] = AppendResult(id, status, seq, memory.hold or "")
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
                "held": memory.hold is not None,
                "hold_reason": memory.hold,
            }
        )
    if rows:
        log = [
            {"pool": pool, "seq": row["seq"], "kind": "add", "memory_id": row["id"]} for row in rows
        ]
        connection.execute(sa.insert(memories), rows)
        connection.execute(sa.insert(changes), log)
        tally.save()
    return [
        result or AppendResult(there[key][0], "duplicate", there[key][1])
        for key, result in zip(keys, results, strict=True)
    ]


def _take_seqs(connection: sa.Connection, pool: str, count: int) -> int:
    """The seq after which ``count`` are the caller's."""
    last: int = connection.execute(
        sa.update(pools)
        .where(pools.c.name == pool)
        .values(last_seq=pools.c.last_seq + count, size=pools.c.size + count)
        .returning(pools.c.last_seq)
    ).scalar_one()
    return last - count


def _present(
    connection: sa.Connection, pool: str, keys: Sequence[str]
) -> dict[str, tuple[str, int]]:
    """Content key to (id, seq) of those that the pool has."""
    found: dict[str, tuple[str, int]] = {}
    for part in in_parts(keys):
        rows = connection.execute(
            sa.select(memories.c.content_key, memories.c.id, memories.c.seq).where(
                memories.c.pool == pool, memories.c.content_key.in_(part)
            )
        )
        found.update((key, (id, seq)) for key, id, seq in rows)
    return found


def _taken_ids(connection: sa.Connection, wanted: Iterable[str | None]) -> set[str]:
    """Those ids that a memory, living or deleted, in any pool has or had."""
    taken: set[str] = set()
    for part in in_parts([id for id in wanted if id is not None]):
        taken.update(connection.scalars(sa.select(memories.c.id).where(memories.c.id.in_(part))))
    return taken
