"""Near-duplicates are found when a memory is written, by the cosine of the serving encoder.

A pool's ``near_duplicate`` is the cosine from which two memories count as one, and
``near_duplicate_action`` says what becomes of the second: dropped, or merged, that is, of the two
the better graded one stays, with what metadata the other has besides. Exact duplicates need none
of this: the store knows them by their content.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from memshare.config import Config
from memshare.pool.errors import InvalidMemory, PoolError
from memshare.pool.store import PoolStore
from memshare.pool.validate import check_memory
from memshare.records import Memory, NewMemory, content_key
from memshare.retrieval.searcher import Searcher, SearcherClosed, SearchTimeout

_RIVALS = 16  # near-duplicates written at one moment that `confirm` looks at


@dataclass(frozen=True, slots=True)
class Place:
    """What to store for a memory, and the near-duplicate that was there, if any.

    ``new`` None: the memory is a duplicate of ``twin``. Both: ``new`` replaces ``twin``. ``seen``:
    every change of the pool up to this seq was searched; None where nothing was looked for.
    """

    new: NewMemory | None
    twin: Memory | None = None
    seen: int | None = None


class NearDuplicates:
    """The pools' policies. Thread-safe.

    In one process the writes of such a pool come one after another, each after the one before can
    be searched for, so that no two near-duplicates slip in side by side.

    Gateways that share a database can't see each other's writes before they are committed. So who
    finds, by its memory's ``seq``, that others wrote between its search and its own write looks
    again (`confirm`). By then all earlier changes of the pool are in effect here, and of two
    near-duplicates the one with the greater ``seq`` always finds the other: the earlier one stays,
    whoever wrote it. For a moment both can be found.
    """

    def __init__(self, store: PoolStore, searcher: Searcher, config: Config) -> None:
        """Only pools that are served can be searched, so only those are watched."""
        self._store = store
        self._searcher = searcher
        self._patience = config.gateway.visible_timeout_seconds
        self._settings = {
            name: settings
            for name, settings in config.pools.items()
            if settings.near_duplicate is not None and name in config.served_pools
        }
        self._locks = {name: threading.Lock() for name in self._settings}

    def watches(self, pool: str) -> bool:
        """Whether writes into ``pool`` are compared."""
        return pool in self._settings

    @contextmanager
    def place(self, memory: NewMemory) -> Iterator[Place]:
        """Where ``memory`` goes: see `Place`.

        What is to be stored must be stored, searchable and confirmed (`confirm`) when the block
        ends; then the near-duplicate that it replaces is deleted. A crash in between leaves both.
        Raises `PoolError` where the searcher can't be asked now.
        """
        if not self.watches(memory.pool):
            yield Place(memory)
            return
        with self._locks[memory.pool]:
            seen = self._searcher.stats().positions.get(memory.pool, 0)
            twin = self.find(memory)
            if twin is None or _key(twin) == _key(memory):
                yield Place(memory, seen=seen)  # equal ones are the store's affair
            elif not self._better(memory, twin):
                yield Place(None, twin)
            else:
                yield Place(self._merged(memory, twin), twin, seen)
                self._delete(twin)

    def confirm(self, place: Place, id: str) -> Memory | None:
        """None, or the earlier near-duplicate that another gateway slipped in before memory ``id``.

        That memory, which was just stored at ``place`` and can be searched for, is deleted then,
        whatever its grade: the other one's writer may have told its id already. Raises `PoolError`
        where the searcher can't be asked now, with the memory stored.
        """
        if place.seen is None:
            return None
        mine = self._store.get(id)
        if mine is None or mine.seq <= place.seen + 1:
            return None  # nobody else wrote in between
        replaced = {id} if place.twin is None else {id, place.twin.id}
        others = [other for other in self._near(mine, _RIVALS) if other.id not in replaced]
        earlier = [other for other in others if other.seq < mine.seq]
        if not earlier:
            return None
        self._delete(mine)
        return min(earlier, key=lambda other: other.seq)

    def find(self, memory: NewMemory) -> Memory | None:
        """The memory nearest to ``memory``, if it is near enough and neither held nor deleted."""
        return next(iter(self._near(memory, 1)), None)

    def _near(self, memory: NewMemory | Memory, most: int) -> list[Memory]:
        """As `find`, ``most`` of them, the nearest first."""
        settings = self._settings[memory.pool]
        assert settings.near_duplicate is not None
        try:
            answer = self._searcher.nearest(
                memory.pool, memory.prompt, memory.answer, most, self._patience
            )
        except (SearchTimeout, SearcherClosed) as error:
            raise PoolError(f"near-duplicates can't be looked for: {error}") from error
        ids = [hit.id for hit in answer.hits if hit.similarity >= settings.near_duplicate]
        there = self._store.get_many(ids)
        return [there[id] for id in ids if id in there]

    def _delete(self, memory: Memory) -> None:
        if self._store.delete(memory.id):
            self._searcher.notify(memory.pool)

    def _merged(self, memory: NewMemory, twin: Memory) -> NewMemory:
        merged = replace(memory, metadata={**twin.metadata, **memory.metadata})
        try:
            return check_memory(merged, self._store.max_text_chars)
        except InvalidMemory:  # the two have too much metadata together
            return memory

    def _better(self, memory: NewMemory, twin: Memory) -> bool:
        if self._settings[memory.pool].near_duplicate_action == "drop" or memory.score is None:
            return False
        return twin.score is None or memory.score > twin.score


def _key(memory: Memory | NewMemory) -> str:
    return content_key(memory.pool, memory.prompt, memory.answer)
