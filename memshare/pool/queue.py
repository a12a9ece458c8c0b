"""The durable queue of pairs that wait for the scorer, shared by the gateways of one database.

A pair is claimed for some seconds, the claim is renewed while it is graded, and the transaction
that stores the pair, or puts the refusal on record, also removes it here (`finish`), if the claim
still holds. So a pair is decided once: a gateway that dies loses its claims after a while and
another one grades those pairs again; one that was only slow finds its claim gone, and its
transaction is undone. Whose turn it is goes by when pairs became free: one that is given back to
rest stands behind all that were put meanwhile, however many such pairs there are.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from memshare import tracing
from memshare.pool.engine import Database
from memshare.pool.ids import new_id
from memshare.pool.rows import need_pool
from memshare.pool.schema import pending
from memshare.records import Pair

# A claim that ends after more than so many leases was made before the clock was set back: it would
# outlive its gateway by as much. Gateways of one database may differ by as much in their leases.
_LONGEST_LEASE = 10
# The same of a pair that nobody has, which rests no longer than this, whoever's lease it was.
_LONGEST_REST_SECONDS = 900.0


class ClaimLost(RuntimeError):
    """Somebody else has claimed the pair, or decided it already."""


@dataclass(frozen=True, slots=True)
class Job:
    """A claimed pair. ``attempts`` counts its claims that were not taken back, this one too.

    ``trace``: the trace that it was put in, for `tracing.resumed`; None: in none.
    """

    id: str
    claim: str
    attempts: int
    pair: Pair
    trace: Mapping[str, str] | None = None


class PairQueue:
    """The queue of one database. Thread-safe; several processes may share the database."""

    def __init__(self, database: Database) -> None:
        """See `PoolStore.database`."""
        self._db = database

    def put(self, pairs: Sequence[Pair]) -> None:
        """Add ``pairs``; durable when this returns. Raises `UnknownPool` with none added.

        Their trace is the caller's (`tracing.carried`).
        """
        trace = tracing.carried()
        rows = [
            {
                "id": new_id(),
                "pool": pair.pool,
                "prompt": pair.prompt,
                "answer": pair.answer,
                "finish_reason": pair.finish_reason,
                "agent": pair.agent,
                "model": pair.model,
                "metadata": dict(pair.metadata),
                "copy_of": pair.copy_of,
                "attempts": 0,
                "trace": trace,
            }
            # By pool, as appends take them, so that no two transactions wait for each other.
            for pair in sorted(pairs, key=lambda pair: pair.pool)
        ]
        with self._db.write() as connection:
            for name in sorted({pair.pool for pair in pairs}):
                need_pool(connection, name)
            free_at = self._now(connection)
            connection.execute(sa.insert(pending), [row | {"free_at": free_at} for row in rows])

    def count(self) -> int:
        """Pairs without a decision, claimed or not."""
        with self._db.read() as connection:
            return connection.execute(sa.select(sa.func.count()).select_from(pending)).scalar_one()

    def claim(self, limit: int, lease_seconds: float, before: str | None = None) -> list[Job]:
        """Up to ``limit`` pairs that nobody has, first who is free longest, for ``lease_seconds``.

        ``before``: only pairs that were put before this id was made (see `new_id`).
        """
        wanted = sa.true() if before is None else pending.c.id < before

        def free(now: float) -> sa.ColumnElement[bool]:
            leases = _LONGEST_LEASE * lease_seconds
            most = sa.case((pending.c.claim.is_(None), _LONGEST_REST_SECONDS), else_=leases)
            over = sa.or_(pending.c.free_at <= now, pending.c.free_at > now + most)
            return sa.and_(wanted, over)

        with self._db.read() as connection:  # most often there are none: no need to lock for that
            there = sa.select(pending.c.id).where(free(self._now(connection))).limit(1)
            if connection.execute(there).first() is None:
                return []
        token = new_id()
        with self._db.write() as connection:
            now = self._now(connection)
            ids = connection.scalars(
                sa.select(pending.c.id)
                .where(free(now))
                .order_by(pending.c.free_at, pending.c.id)
                .limit(limit)
                .with_for_update(skip_locked=True)  # SQLite's writers are alone anyway
            ).all()
            rows = connection.execute(
                sa.update(pending)
                .where(pending.c.id.in_(ids))
                .values(claim=token, free_at=now + lease_seconds, attempts=pending.c.attempts + 1)
                .returning(*pending.c)
            ).all()
        return sorted((_job(row) for row in rows), key=lambda job: job.id)

    def renew(self, claims: Collection[str], lease_seconds: float) -> None:
        """Keep what these claims still hold for another ``lease_seconds``."""
        with self._db.write() as connection:
            connection.execute(
                sa.update(pending)
                .where(pending.c.claim.in_(claims))
                .values(free_at=self._now(connection) + lease_seconds)
            )

    def release(
        self, jobs: Collection[Job], pause_seconds: float = 0.0, counted: bool = False
    ) -> None:
        """Give pairs back undecided, for anybody to claim after a pause; ``counted``: an attempt.

        No pause is longer than 15 minutes: beyond that `claim` sees a clock that was set back.
        """
        pause_seconds = min(pause_seconds, _LONGEST_REST_SECONDS)
        attempts = pending.c.attempts if counted else pending.c.attempts - 1
        with self._db.write() as connection:
            free_at = self._now(connection) + pause_seconds if pause_seconds else 0.0
            for job in jobs:
                connection.execute(
                    sa.update(pending)
                    .where(_held_by(job))
                    .values(claim=None, free_at=free_at, attempts=attempts)
                )

    @staticmethod
    def finish(connection: sa.Connection, job: Job) -> None:
        """Remove a decided pair, in the transaction that decides. Raises `ClaimLost`."""
        if connection.execute(sa.delete(pending).where(_held_by(job))).rowcount != 1:
            raise ClaimLost(f"pair {job.id} was claimed by another gateway meanwhile")

    def _now(self, connection: sa.Connection) -> float:
        """Seconds since 1970 by the one clock that all gateways of this database share."""
        if self._db.is_sqlite:
            return time.time()
        clock = sa.func.extract("epoch", sa.func.clock_timestamp())
        return float(connection.execute(sa.select(clock)).scalar_one())


def _job(row: Any) -> Job:
    pair = Pair(
        row.pool, row.prompt, row.answer, row.finish_reason, row.agent, row.model, row.metadata,
        row.copy_of,
    )  # fmt: skip
    return Job(row.id, row.claim, row.attempts, pair, row.trace)


def _held_by(job: Job) -> sa.ColumnElement[bool]:
    return sa.and_(pending.c.id == job.id, pending.c.claim == job.claim)
