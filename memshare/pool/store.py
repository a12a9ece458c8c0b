"""The pool store: where memories live. Text is the source of truth; vectors are derived from it.

Writes are transactions. Each takes its ``seq`` numbers from the pool's row, which stays locked
until the commit, so numbers become visible in order: a reader that has seen ``seq <= s`` never
finds a new row there later. Appends and all changes share one sequence and one log.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import sqlalchemy as sa

from memshare.pool import alter, decisions
from memshare.pool import stats as figures
from memshare.pool.append import append_to_pool
from memshare.pool.engine import IDS_LOCK, POOLS_LOCK, USES_LOCK, Database
from memshare.pool.errors import InvalidMemory, PoolError
from memshare.pool.limits import NO_LIMITS, Limits
from memshare.pool.rows import (
    ALIVE,
    find_pool,
    in_parts,
    make_cursor,
    memory_of,
    need_pool,
    page_of,
    pool_info,
    read_cursor,
    size_of,
    span_end,
)
from memshare.pool.schema import changes, memories, pools
from memshare.pool.stats import PoolStats
from memshare.pool.validate import (
    MAX_TEXT_CHARS,
    check_memory,
    check_pool_name,
    check_score,
    check_text,
)
from memshare.records import AppendResult, Change, Memory, NewMemory, PoolInfo

PAGE = 1000
MAX_REASON_CHARS = 500
NONE: Mapping[str, Limits] = {}  # no pool has limits
_SCRUB_PAUSE_SECONDS = 0.02  # between two tries; readers of a pool take milliseconds


class PoolStore:
    """Pools in one database. Thread-safe; several processes may share the database."""

    def __init__(
        self, url: str, max_text_chars: int = MAX_TEXT_CHARS, must_exist: bool = False
    ) -> None:
        """Use the database at ``url``, whose schema must be current; see `open`."""
        self.max_text_chars = max_text_chars
        self._db = Database(url, must_exist)

    @classmethod
    def open(
        cls, url: str, max_text_chars: int = MAX_TEXT_CHARS, must_exist: bool = False
    ) -> PoolStore:
        """Open ``url``, creating or migrating its tables.

        Such as ``sqlite:///runs/demo/pool.db``, or ``postgresql://user@host/name``, a database that
        must be there. ``must_exist`` refuses to create an SQLite file. Raises `PoolError`: a URL
        that can't be used, or a database newer than this code.
        """
        store = cls(url, max_text_chars, must_exist)
        try:
            store._db.migrate()
        except BaseException:
            store.close()
            raise
        return store

    @property
    def database(self) -> Database:
        """The database, for those who keep tables of their own beside the pools."""
        return self._db

    def close(self) -> None:
        """Close every connection."""
        self._db.engine.dispose()

    def __enter__(self) -> PoolStore:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    # Pools

    def create_pool(self, name: str, rubric: str = "general", threshold: float = 80.0) -> PoolInfo:
        """Create a pool, or return the one that has this name, its settings untouched."""
        check_pool_name(name)
        _check_settings(rubric, threshold)
        with self._db.write() as connection:
            self._db.backend.lock(connection, POOLS_LOCK)
            if find_pool(connection, name) is None:
                connection.execute(
                    sa.insert(pools).values(
                        name=name, rubric=rubric, threshold=float(threshold), last_seq=0
                    )
                )
            return need_pool(connection, name)

    def set_pool(
        self, name: str, rubric: str | None = None, threshold: float | None = None
    ) -> PoolInfo:
        """Change a pool's settings; None leaves one as it is. Raises `UnknownPool`."""
        with self._db.write() as connection:
            info = need_pool(connection, name)
            rubric = info.rubric if rubric is None else rubric
            threshold = info.threshold if threshold is None else threshold
            _check_settings(rubric, threshold)
            connection.execute(
                sa.update(pools)
                .where(pools.c.name == name)
                .values(rubric=rubric, threshold=float(threshold))
            )
            return need_pool(connection, name)

    def pool(self, name: str) -> PoolInfo:
        """One pool; raises `UnknownPool`."""
        with self._db.read() as connection:
            return need_pool(connection, name)

    def pools(self) -> list[PoolInfo]:
        """Every pool, by name."""
        with self._db.read() as connection:
            found = [pool_info(row) for row in connection.execute(sa.select(pools))]
        return sorted(found, key=lambda info: info.name)  # a database's own order may differ

    def last_seq(self, pool: str) -> int:
        """The pool's position: the seq of its latest change, 0 for an empty pool."""
        return self.pool(pool).last_seq

    def size(self, pool: str) -> int:
        """How many living memories it has, held ones too; known without counting them."""
        with self._db.read() as connection:
            need_pool(connection, pool)
            return size_of(connection, pool)

    def held(self, pool: str) -> int:
        """How many of them are on hold."""
        with self._db.read() as connection:
            need_pool(connection, pool)
            return figures.held(connection, pool)

    def stats(self, pool: str) -> PoolStats:
        """Counts, scores and decisions of one pool, whose every row is read for them."""
        with self._db.read() as connection:
            return figures.collect(connection, need_pool(connection, pool))

    def decisions(self, pool: str) -> dict[str, int]:
        """Reason to count, most frequent first; accepted pairs count as ``stored``."""
        with self._db.read() as connection:
            need_pool(connection, pool)
            return decisions.counts(connection, pool)

    # Writing memories

    def append(
        self, new: Sequence[NewMemory], limits: Mapping[str, Limits] = NONE
    ) -> list[AppendResult]:
        """Append in one transaction; durable when this returns. Results are in input order.

        A memory whose content (normalised prompt and answer) its pool has already, or that came
        earlier in ``new``, is a duplicate and changes nothing. One that breaks the ``limits`` of
        its pool is rejected, and the others are appended. Nothing is written when one memory is
        invalid (`InvalidMemory`) or its pool unknown (`UnknownPool`).
        """
        checked = [check_memory(memory, self.max_text_chars) for memory in new]
        return self.append_checked(checked, limits)

    def append_checked(
        self, checked: Sequence[NewMemory], limits: Mapping[str, Limits] = NONE
    ) -> list[AppendResult]:
        """As `append`, for memories that `check_memory` has returned."""
        with self._db.write() as connection:
            return self.append_in(connection, checked, limits)

    def append_in(
        self,
        connection: sa.Connection,
        checked: Sequence[NewMemory],
        limits: Mapping[str, Limits] = NONE,
    ) -> list[AppendResult]:
        """As `append_checked`, in a write transaction of the caller's."""
        results: list[AppendResult | None] = [None] * len(checked)
        if any(memory.id is not None for memory in checked):
            # Whether an id was ever used is a question to all pools, so one import at a time.
            self._db.backend.lock(connection, IDS_LOCK)
        # Sorted, so that two transactions over the same pools never wait for each other.
        for name in sorted({memory.pool for memory in checked}):
            need_pool(connection, name, lock=True)
            places = [i for i, memory in enumerate(checked) if memory.pool == name]
            mine = [checked[i] for i in places]
            stored = append_to_pool(connection, name, mine, limits.get(name, NO_LIMITS))
            for i, result in zip(places, stored, strict=True):
                results[i] = result
            if any(result.status in ("stored", "held") for result in stored):
                self._db.backend.announce(connection, name)
        return [result for result in results if result is not None]

    def delete(self, id: str, heir: str | None = None, metadata: bool = False) -> bool:
        """Erase a memory's text and metadata; False if there is no such living memory.

        Its id stays taken and the log tells of it; the same content appended later is a new memory.
        On SQLite the text is out of the files too when this returns, unless somebody is reading
        there just then: see `scrub`. Memory ``heir`` takes over its feedback, uses and copies, and
        the ``metadata`` that it lacks, as `amend` has it.
        """
        return self.delete_many([id], heir, metadata) == 1

    def delete_many(
        self, ids: Sequence[str], heir: str | None = None, metadata: bool = False
    ) -> int:
        """`delete` each of ``ids``, and scrub once; how many there were."""
        count = sum(self._erase(id, heir, metadata) for id in ids)
        self.scrub()
        return count

    def amend(self, id: str, metadata: Mapping[str, Any]) -> bool:
        """Give a memory the ``metadata`` that it lacks; what it has stays as it is.

        False where nothing changes: it lacks nothing, it would have too much, or none lives.
        Searches' filters know of what is added.
        """
        with self._db.write() as connection:
            pool = alter.amend(connection, id, metadata, self.max_text_chars)
            return self._announced(connection, pool)

    def scrub(self, patience: float = 0.0) -> bool:
        """Have erased text, whoever erased it, overwritten in the database's files.

        Costs a look at one number if there is none. False: it is still readable in SQLite's log,
        since somebody was reading for ``patience`` seconds. Then try again later, from any process.
        """
        deadline = time.monotonic() + patience
        while not (done := self._db.scrub()) and time.monotonic() < deadline:
            time.sleep(_SCRUB_PAUSE_SECONDS)
        return done

    def _erase(self, id: str, heir: str | None, metadata: bool) -> bool:
        with self._db.write() as connection:
            if heir is not None:  # before the pool, so that nobody who has one waits for this
                self._db.backend.lock(connection, USES_LOCK)
            # In one transaction: whatever is merged into it before it is gone is passed on.
            known = alter.metadata_of(connection, id) if heir is not None and metadata else {}
            pool = alter.delete(connection, id, heir)
            if pool is not None and heir is not None and known:
                alter.amend(connection, heir, known, self.max_text_chars)
            if pool is not None:
                self._db.backend.mark_erased(connection)
            return self._announced(connection, pool)

    def hold(self, id: str, reason: str | None = None) -> bool:
        """Take a memory out of retrieval and training; False if it is held, deleted or unknown.

        Raises `InvalidMemory` for an unusable ``reason``.
        """
        if reason is not None:
            check_text("reason", reason, MAX_REASON_CHARS)
        with self._db.write() as connection:
            return self._announced(connection, alter.hold(connection, id, reason))

    def release(self, id: str) -> bool:
        """Undo `hold`; False if it is not held."""
        with self._db.write() as connection:
            return self._announced(connection, alter.release(connection, id))

    def _announced(self, connection: sa.Connection, pool: str | None) -> bool:
        """Whether something changed, which others are told of, in ``pool``."""
        if pool is not None:
            self._db.backend.announce(connection, pool)
        return pool is not None

    # Reading memories

    def get(self, id: str) -> Memory | None:
        """A living memory, held or not; None if it is unknown or deleted."""
        return self.get_many([id]).get(id)

    def get_many(self, ids: Sequence[str]) -> dict[str, Memory]:
        """The living memories among ``ids``, held ones too, by id."""
        found: dict[str, Memory] = {}
        with self._db.read() as connection:
            for part in in_parts(list(dict.fromkeys(ids))):
                rows = connection.execute(sa.select(memories).where(memories.c.id.in_(part), ALIVE))
                found.update((row.id, memory_of(row)) for row in rows)
        return found

    def changes(self, pool: str, since: int, limit: int = 1000) -> list[Change]:
        """Up to ``limit`` changes with ``seq > since``, in order. Raises `UnknownPool`."""
        with self._db.read() as connection:
            rows = connection.execute(
                sa.select(changes)
                .where(changes.c.pool == pool, changes.c.seq > since)
                .order_by(changes.c.seq)
                .limit(limit)
            ).all()
            if not rows:
                need_pool(connection, pool)
            return [Change(row.pool, row.seq, row.kind, row.memory_id) for row in rows]

    def listening(self, wake: Callable[[], None]) -> AbstractContextManager[None]:
        """While open, ``wake`` is called from another thread soon after any process's change.

        On PostgreSQL; an SQLite file tells nobody, and a connection may be lost. So who follows the
        changes must poll for them too; this only makes it sooner.
        """
        return self._db.backend.listening(wake)

    def list(
        self, pool: str, cursor: str | None = None, limit: int = 100, held: bool | None = False
    ) -> tuple[list[Memory], str | None]:
        """One page in seq order and the cursor of the next, None at the end.

        ``held``: only memories on hold, only the others, or (None) both.

        Raises `UnknownPool`, and `PoolError` for a cursor that this store did not make.
        """
        if limit < 1:
            raise PoolError(f"limit: {limit} is not positive")
        after = 0 if cursor is None else read_cursor(cursor)
        with self._db.read() as connection:
            info = need_pool(connection, pool)
            limit = min(limit, info.last_seq + 1)  # a database's integers have an end
            page = page_of(connection, pool, after, info.last_seq, limit + 1, held)
        if len(page) <= limit:
            return page, None
        return page[:limit], make_cursor(page[limit - 1].seq)

    def iter(
        self,
        pool: str,
        after_seq: int = 0,
        until_seq: int | None = None,
        include_held: bool = False,
    ) -> Iterator[Memory]:
        """Stream the living memories with ``after_seq < seq <= until_seq`` in seq order.

        ``until_seq`` None: the pool's position now. Read page by page: memory use does not grow
        with the pool, no transaction stays open between pages, and what is deleted meanwhile is
        left out. Raises `UnknownPool` at once.
        """
        last = self.last_seq(pool)
        until = last if until_seq is None else until_seq
        return self._pages(pool, after_seq, until, None if include_held else False)

    def _pages(self, pool: str, after: int, until: int, held: bool | None) -> Iterator[Memory]:
        while after < until:
            with self._db.read() as connection:
                page = page_of(connection, pool, after, until, PAGE, held)
            yield from page
            if len(page) < PAGE:
                return
            after = page[-1].seq

    def span_end(self, pool: str, after_seq: int, until_seq: int, count: int) -> int:
        """Where ``count`` memories of `iter` after ``after_seq`` end; no text is read.

        ``until_seq`` where there are fewer of them.
        """
        with self._db.read() as connection:
            return span_end(connection, pool, after_seq, until_seq, count)


def _check_settings(rubric: str, threshold: float) -> None:
    check_text("rubric", rubric)
    if check_score(threshold, "threshold") is None:
        raise InvalidMemory("threshold", "a number in 0..100 expected")
