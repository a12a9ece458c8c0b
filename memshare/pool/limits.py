"""How much of a pool one principal may write, and how often one answer may be copied.

Whoever writes most steers what all others are shown (AgentPoison, Chen et al. 2024; MINJA, Dong et
al. 2025), so a principal's part of a pool has a limit; and an answer that agents copy from a memory
shown to them, under one question after the other, spreads under the names of those who copied it.
Both are counted in the transaction that appends, while the pool's row is locked, so no two writers
slip past a limit side by side. Nothing is scanned: the counts are kept by append and delete.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import sqlalchemy as sa

from memshare.pool.rows import ALIVE, in_parts, size_of
from memshare.pool.schema import authors, copies, memories, pools
from memshare.records import NewMemory


@dataclass(frozen=True, slots=True)
class Limits:
    """A pool's limits; None: there is none.

    A principal may have ``principal_share`` of the pool's living memories, the new one counted, and
    ``principal_floor`` of them however small the pool is. ``copies``: of one memory's answer.
    Memories that name no agent are nobody's.
    """

    principal_share: float | None = None
    principal_floor: int = 0
    copies: int | None = None


NO_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a memory is refused; ``id``: the memory that it copies, or empty."""

    reason: str
    id: str = ""


class Tally:
    """One pool's counts in one appending transaction; the caller has locked the pool's row."""

    def __init__(
        self, connection: sa.Connection, pool: str, agents: Collection[str], limits: Limits
    ) -> None:
        """``agents``: those who wrote what is to be appended."""
        self._connection = connection
        self._pool = pool
        self._limits = limits
        self._size = size_of(connection, pool)
        self._before = _counts(connection, pool, agents)
        self._new: Counter[str] = Counter()
        self._copies: list[tuple[str, str]] = []

    def refuse(self, memory: NewMemory) -> Refusal | None:
        """Why ``memory`` must not be appended now; None if it may."""
        share = self._limits.principal_share
        if share is not None and memory.agent is not None:
            have = self._before.get(memory.agent, 0) + self._new[memory.agent]
            if have >= max(self._limits.principal_floor, int(share * (self._size + 1) + 1e-9)):
                return Refusal(
                    f"{memory.agent} wrote {have} of the pool's {self._size} memories, as many as "
                    "one principal may have there"
                )
        if memory.copy_of is not None:
            shown = sa.select(memories.c.id).where(
                memories.c.id == memory.copy_of, ALIVE, ~memories.c.held
            )
            if self._connection.execute(shown).first() is None:
                return Refusal("it repeats the answer of a memory that was deleted or put on hold")
            there = self._copies_of(self._origin(memory.copy_of))
            if self._limits.copies is not None and there >= self._limits.copies:
                return Refusal(
                    f"it repeats the answer of a memory shown, which {there} others repeat already",
                    memory.copy_of,
                )
        return None

    def add(self, memory: NewMemory, id: str) -> None:
        """Count ``memory``, which will be appended as ``id``."""
        self._size += 1
        if memory.agent is not None:
            self._new[memory.agent] += 1
        if memory.copy_of is not None:
            self._copies.append((id, self._origin(memory.copy_of)))

    def save(self) -> None:
        """Write the counts of agents and the copies; the memories themselves are there by now."""
        names = {"pool": self._pool}
        old = [{"who": name, "more": n} for name, n in self._new.items() if name in self._before]
        new = [{"agent": name, "count": n, **names} for name, n in self._new.items()
               if name not in self._before]  # fmt: skip
        if old:
            self._connection.execute(
                sa.update(authors)
                .where(authors.c.pool == self._pool, authors.c.agent == sa.bindparam("who"))
                .values(count=authors.c.count + sa.bindparam("more")),
                old,
            )
        if new:
            self._connection.execute(sa.insert(authors), new)
        if self._copies:
            rows = [{"memory_id": id, "origin_id": origin} for id, origin in self._copies]
            self._connection.execute(sa.insert(copies), rows)

    def _origin(self, id: str) -> str:
        """Where the answer of memory ``id`` comes from: itself, unless it is a copy."""
        query = sa.select(copies.c.origin_id).where(copies.c.memory_id == id)
        return self._connection.execute(query).scalar() or id

    def _copies_of(self, origin: str) -> int:
        query = sa.select(sa.func.count()).where(copies.c.origin_id == origin)
        stored = self._connection.execute(query).scalar_one()
        return stored + sum(where == origin for _, where in self._copies)


def forget(connection: sa.Connection, pool: str, id: str, agent: str | None) -> None:
    """Take a memory that is deleted out of the counts; its pool's row is locked."""
    connection.execute(sa.delete(copies).where(copies.c.memory_id == id))
    connection.execute(
        sa.update(authors)
        .where(authors.c.pool == pool, authors.c.agent == agent)
        .values(count=authors.c.count - 1)
    )
    connection.execute(sa.update(pools).where(pools.c.name == pool).values(size=pools.c.size - 1))


def _counts(connection: sa.Connection, pool: str, agents: Collection[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for part in in_parts(sorted(agents)):
        rows = connection.execute(
            sa.select(authors.c.agent, authors.c.count).where(
                authors.c.pool == pool, authors.c.agent.in_(part)
            )
        )
        found.update((agent, count) for agent, count in rows)
    return found
