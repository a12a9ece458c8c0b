"""Feedback: what principals think of memories, and the standing that comes of it.

Each principal has one opinion of a memory, from -1 (harmful) to 1 (useful), and may change it. The
standing is their sum over their number plus two: two neutral votes are there from the start, so
that a single one moves it by a third and many agree before it nears an end (Laplace's rule).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from memshare.pool.engine import Database
from memshare.pool.errors import InvalidMemory
from memshare.pool.rows import ALIVE, in_parts, need_pool
from memshare.pool.schema import feedback, memories
from memshare.pool.validate import check_text, now

NEUTRAL_VOTES = 2
_LEAST = 1e-9  # a weaker opinion is neutral: PostgreSQL refuses quotients too small for a float
_MAX_COMMENT_CHARS = 2000


@dataclass(frozen=True, slots=True)
class Standing:
    """``value`` in -1..1, 0 without votes; ``votes``: principals that gave feedback."""

    value: float = 0.0
    votes: int = 0


NO_STANDING = Standing()


class Feedback:
    """The feedback in one database. Thread-safe; several processes may share the database."""

    def __init__(self, database: Database) -> None:
        """See `PoolStore.database`."""
        self._db = database

    def give(
        self, memory_id: str, principal: str, value: float, comment: str | None = None
    ) -> Standing | None:
        """Set ``principal``'s opinion; the standing then, or None if no such memory lives.

        Raises `InvalidMemory` for a value outside -1..1 or an unusable comment.
        """
        if not -1.0 <= value <= 1.0:
            raise InvalidMemory("value", f"{value} is not in -1..1")
        if comment is not None:
            check_text("comment", comment, _MAX_COMMENT_CHARS)
        kept = float(value) if abs(value) >= _LEAST else 0.0
        opinion = {"value": kept, "comment": comment, "given_at": now()}
        mine = sa.and_(feedback.c.memory_id == memory_id, feedback.c.principal == principal)
        with self._db.write() as connection:
            # Locked, so that two first opinions of one principal come one after the other.
            alive = sa.select(memories.c.id).where(memories.c.id == memory_id, ALIVE)
            if connection.execute(alive.with_for_update()).first() is None:
                return None
            if connection.execute(sa.update(feedback).where(mine).values(opinion)).rowcount == 0:
                who = {"memory_id": memory_id, "principal": principal}
                connection.execute(sa.insert(feedback).values(**who, **opinion))
            return _standings(connection, [memory_id])[memory_id]

    def standings(self, ids: Sequence[str]) -> dict[str, Standing]:
        """The standings of those among ``ids`` that have any; the others are at `NO_STANDING`."""
        found: dict[str, Standing] = {}
        with self._db.read() as connection:
            for part in in_parts(ids):
                found.update(_standings(connection, part))
        return found

    def of_pool(self, pool: str) -> dict[str, Standing]:
        """Standings of the living memories of ``pool`` that have feedback, by id, the worst first.

        For pruning and for weighting examples. Raises `UnknownPool`.
        """
        with self._db.read() as connection:
            need_pool(connection, pool)
            query = (
                _SELECT.join(memories, memories.c.id == feedback.c.memory_id)
                .where(memories.c.pool == pool, ALIVE)
                .order_by(_VALUE, feedback.c.memory_id)
            )
            return _by_id(connection.execute(query))


_VALUE = sa.func.sum(feedback.c.value) / (sa.func.count() + NEUTRAL_VOTES)
_SELECT = sa.select(
    feedback.c.memory_id, _VALUE.label("value"), sa.func.count().label("votes")
).group_by(feedback.c.memory_id)


def _standings(connection: sa.Connection, ids: Sequence[str]) -> dict[str, Standing]:
    return _by_id(connection.execute(_SELECT.where(feedback.c.memory_id.in_(ids))))


def _by_id(rows: Iterable[Any]) -> dict[str, Standing]:
    return {id: Standing(value, votes) for id, value, votes in rows}
