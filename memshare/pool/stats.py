"""Figures about one pool."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from memshare.pool import decisions
from memshare.pool.rows import ALIVE
from memshare.pool.schema import memories
from memshare.records import PoolInfo


@dataclass(frozen=True, slots=True)
class ScoreSummary:
    """Scores of the living memories that have one; mean, min and max are None without any."""

    count: int
    mean: float | None
    min: float | None
    max: float | None


@dataclass(frozen=True, slots=True)
class PoolStats:
    """``memories`` counts the living ones, held ones among them; ``by_agent`` likewise.

    An agent that is not known counts under the empty name. ``decisions``: reason to count.
    """

    pool: PoolInfo
    memories: int
    held: int
    deleted: int
    by_agent: dict[str, int]
    scores: ScoreSummary
    decisions: dict[str, int]


def held(connection: sa.Connection, pool: str) -> int:
    """How many memories of a pool are on hold."""
    query = sa.select(sa.func.count()).where(memories.c.pool == pool, ALIVE, memories.c.held)
    count: int = connection.execute(query).scalar_one()
    return count


def collect(connection: sa.Connection, pool: PoolInfo) -> PoolStats:
    """Read the figures in the snapshot of ``connection``."""
    mine = memories.c.pool == pool.name
    alive = sa.and_(mine, ALIVE)
    total, held, scored, mean, low, high = connection.execute(
        sa.select(
            sa.func.count(),
            sa.func.count().filter(memories.c.held),
            sa.func.count(memories.c.score),
            sa.func.avg(memories.c.score),
            sa.func.min(memories.c.score),
            sa.func.max(memories.c.score),
        ).where(alive)
    ).one()
    deleted = connection.execute(
        sa.select(sa.func.count()).where(mine, memories.c.deleted_at.is_not(None))
    ).scalar_one()
    by_agent = connection.execute(
        sa.select(memories.c.agent, sa.func.count()).where(alive).group_by(memories.c.agent)
    )
    return PoolStats(
        pool=pool,
        memories=total,
        held=held,
        deleted=deleted,
        by_agent=dict(sorted((agent or "", count) for agent, count in by_agent)),
        scores=ScoreSummary(scored, mean, low, high),
        decisions=decisions.counts(connection, pool.name),
    )
