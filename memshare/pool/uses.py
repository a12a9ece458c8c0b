"""How often memories were found: counted by each searching process, added up in the database."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping

import sqlalchemy as sa

from memshare.pool.engine import USES_LOCK, Database
from memshare.pool.rows import ALIVE, in_parts, need_pool
from memshare.pool.schema import memories, uses


class UseCounts:
    """The counts in one database. Thread-safe; several processes may share the database."""

    def __init__(self, database: Database) -> None:
        """See `PoolStore.database`."""
        self._db = database

    def add(self, counts: Mapping[str, int]) -> None:
        """Add ``counts`` by memory id, in one transaction; ids of no living memory are left out."""
        if not counts:
            return
        with self._db.write() as connection:
            self._db.backend.lock(connection, USES_LOCK)
            for part in in_parts(sorted(counts)):
                there = set(
                    connection.scalars(
                        sa.select(memories.c.id).where(memories.c.id.in_(part), ALIVE)
                    )
                )
                known = set(
                    connection.scalars(
                        sa.select(uses.c.memory_id).where(uses.c.memory_id.in_(part))
                    )
                )
                rows = [{"id": id, "more": counts[id]} for id in part if id in there]
                old = [row for row in rows if row["id"] in known]
                new = [row for row in rows if row["id"] not in known]
                if old:
                    connection.execute(
                        sa.update(uses)
                        .where(uses.c.memory_id == sa.bindparam("id"))
                        .values(count=uses.c.count + sa.bindparam("more")),
                        old,
                    )
                if new:
                    connection.execute(
                        sa.insert(uses),
                        [{"memory_id": row["id"], "count": row["more"]} for row in new],
                    )

    def of_pool(self, pool: str) -> dict[str, int]:
        """Counts of the living memories of ``pool`` that were ever found. Raises `UnknownPool`."""
        with self._db.read() as connection:
            need_pool(connection, pool)
            rows = connection.execute(
                sa.select(uses.c.memory_id, uses.c.count)
                .join(memories, memories.c.id == uses.c.memory_id)
                .where(memories.c.pool == pool, ALIVE)
            )
            return {id: count for id, count in rows}


class UseCounter:
    """Counts in memory, so that no search waits for the database; `flush` adds them up there.

    Thread-safe. What a crash loses is what was counted since the last flush.
    """

    def __init__(self, counts: UseCounts) -> None:
        """Nothing is counted yet."""
        self._counts = counts
        self._lock = threading.Lock()
        self._fresh: Counter[str] = Counter()

    def count(self, ids: Iterable[str]) -> None:
        """One more use for each of ``ids``."""
        with self._lock:
            self._fresh.update(ids)

    def flush(self) -> None:
        """Add up what was counted. Raises `PoolError` with what is left kept for the next time.

        In several short transactions: writers of memories would have to wait for a long one.
        """
        with self._lock:
            fresh, self._fresh = self._fresh, Counter()
        try:
            for part in in_parts(sorted(fresh)):
                self._counts.add({id: fresh[id] for id in part})
                for id in part:
                    del fresh[id]
        except BaseException:
            with self._lock:
                self._fresh.update(fresh)
            raise
