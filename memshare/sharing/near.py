"""Near-duplicates are found when a memory is written, by the cosine of the serving encoder.

A pool's ``near_duplicate`` is the cosine from which two memories count as one, and
``near_duplicate_action`` says what becomes of the second: dropped, or merged, that is, of the two
the better graded one stays, with what metadata the other has besides. Exact duplicates need none
of this: the store knows them by their content.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from memshare.config import Config
from memshare.pool.errors import InvalidMemory, PoolError
from memshare.pool.store import PoolStore
from memshare.pool.validate import check_memory
from memshare.records import Memory, NewMemory, content_key
from memshare.retrieval.searcher import Searcher
from memshare.retrieval.worker import SearcherClosed, SearchTimeout

_RIVALS = 16  # near-duplicates written at one moment that are looked at


@dataclass(frozen=True, slots=True)
class Place:
    """What to store for a memory, and the near-duplicate that was there, if any.

    ``new`` None: the memory is a duplicate of ``twin``. Both: ``new`` replaces ``twin``, which is
    deleted once ``new`` is stored and confirmed. ``seen``:
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
        ends. A crash in between leaves both. Raises `PoolError` where the searcher can't be asked
        now.
        """
        if not self.watches(memory.pool):
            yield Place(memory)
            return
        with self._locks[memory.pool]:
            yield self._placed(memory)

    def _placed(self, memory: NewMemory) -> Place:
        while True:
            seen = self._searcher.stats().positions.get(memory.pool, 0)
            twin = self.find(memory)
            if twin is None or _key(twin) == _key(memory):
                return Place(memory, seen=seen)  # equal ones are the store's affair
            if self._better(memory, twin):
                return Place(self._with(memory, twin.metadata) or memory, twin, seen)
            if self._amend(twin, memory):
                return Place(None, twin)
            # Another gateway has just replaced it: look for what is there now.

    def confirm(self, place: Place, id: str) -> Memory | None:
        """None, or the earlier near-duplicate that another gateway slipped in before memory ``id``.

        That memory, which was just stored at ``place`` and can be searched for, is deleted then,
        whatever its grade: the other one's writer may have told its id already. Whichever stays
        takes over feedback, uses and copies of what goes, be it the other one or the near-duplicate
        that was there, and where the pool merges, metadata too.
        Raises `PoolError` where the searcher can't be asked now, with the memory stored.
        """
        if place.seen is None:
            return None
        mine = self._store.get(id)
        if mine is None:
            return None
        earlier = self._earlier(place, mine)
        if earlier is not None:
            self._replace(mine, earlier)
        if place.twin is not None:
            self._replace(place.twin, earlier or mine)
        return earlier

    def _replace(self, memory: Memory, by: Memory) -> None:
        # With the metadata that it has by now: others may have merged theirs into it meanwhile.
        if self._store.delete(memory.id, by.id, metadata=self._merges(memory.pool)):
            self._searcher.notify(memory.pool)

    def _earlier(self, place: Place, mine: Memory) -> Memory | None:
        assert place.seen is not None
        if mine.seq <= place.seen + 1:
            return None  # nobody else wrote in between
        replaced = {mine.id} if place.twin is None else {mine.id, place.twin.id}
        others = [other for other in self._near(mine) if other.id not in replaced]
        earlier = [other for other in others if other.seq < mine.seq]
        return min(earlier, key=lambda other: other.seq, default=None)

    def find(self, memory: NewMemory) -> Memory | None:
        """The earliest memory that is near enough to ``memory``, neither held nor deleted.

        Not the nearest: that one may be of another gateway that is about to find itself overtaken
        (`confirm`). Whoever sees it sees the earlier one too.
        """
        return min(self._near(memory), key=lambda other: other.seq, default=None)

    def _near(self, memory: NewMemory | Memory) -> list[Memory]:
        """All that are near enough, as far as the search goes (`_RIVALS`)."""
        settings = self._settings[memory.pool]
        assert settings.near_duplicate is not None
        try:
            answer = self._searcher.nearest(
                memory.pool, memory.prompt, memory.answer, _RIVALS, self._patience
            )
        except (SearchTimeout, SearcherClosed) as error:
            raise PoolError(f"near-duplicates can't be looked for: {error}") from error
        ids = [hit.id for hit in answer.hits if hit.similarity >= settings.near_duplicate]
        there = self._store.get_many(ids)
        return [there[id] for id in ids if id in there]

    def _amend(self, twin: Memory, memory: NewMemory) -> bool:
        """Give ``twin``, which stays, the metadata that only ``memory`` has, if its pool merges.

        False: it is gone.
        """
        if not self._merges(twin.pool):
            return True
        if self._store.amend(twin.id, memory.metadata):
            self._searcher.notify(twin.pool)
            return True
        return self._store.get(twin.id) is not None

    def _with(self, memory: NewMemory, metadata: Mapping[str, Any]) -> NewMemory | None:
        """``memory`` and what ``metadata`` has besides its own; None if that is too much."""
        merged = replace(memory, metadata={**metadata, **memory.metadata})
        try:
            return check_memory(merged, self._store.max_text_chars)
        except InvalidMemory:
            return None

    def _merges(self, pool: str) -> bool:
        return self._settings[pool].near_duplicate_action == "merge"

    def _better(self, memory: NewMemory, twin: Memory) -> bool:
        if not self._merges(memory.pool) or memory.score is None:
            return False
        return twin.score is None or memory.score > twin.score


def _key(memory: Memory | NewMemory) -> str:
    return content_key(memory.pool, memory.prompt, memory.answer)
