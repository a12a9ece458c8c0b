"""What became of graded pairs: ``stored``, or why one was rejected. No text is kept of them."""

from __future__ import annotations

import sqlalchemy as sa

from memshare.pool.rows import need_pool
from memshare.pool.schema import decisions
from memshare.pool.validate import check_score, check_text, now


def record(
    connection: sa.Connection,
    pool: str,
    reason: str,
    prompt_hash: str,
    score: float | None,
    agent: str | None,
    memory_id: str | None,
) -> None:
    """Put a decision on record, in a write transaction of the caller's. Raises `UnknownPool`."""
    check_text("reason", reason)
    need_pool(connection, pool)
    connection.execute(
        sa.insert(decisions).values(
            pool=pool, decided_at=now(), reason=reason, prompt_hash=prompt_hash,
            score=check_score(score), agent=agent, memory_id=memory_id,
        )
    )  # fmt: skip


def counts(connection: sa.Connection, pool: str) -> dict[str, int]:
    """Reason to count, most frequent first."""
    count = sa.func.count()
    rows = connection.execute(
        sa.select(decisions.c.reason, count)
        .where(decisions.c.pool == pool)
        .group_by(decisions.c.reason)
    )
    found: list[tuple[str, int]] = [(reason, number) for reason, number in rows]
    return dict(sorted(found, key=lambda item: (-item[1], item[0])))
