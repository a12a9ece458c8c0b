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
from dataclasses import replace

from memshare.config import Config
from memshare.pool.errors import InvalidMemory, PoolError
from memshare.pool.store import PoolStore
from memshare.pool.validate import check_memory
from memshare.records import Memory, NewMemory, content_key
from memshare.retrieval.searcher import Searcher, SearcherClosed, SearchTimeout


class NearDuplicates:
    """The pools' policies. Thread-safe.

    In one process the writes of such a pool come one after another, each after the one before can
    be searched for, so that no two near-duplicates slip in side by side. Two gateways may still do
    that; pruning by ``near-duplicates`` finds them.
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
    def place(self, memory: NewMemory) -> Iterator[tuple[NewMemory | None, Memory | None]]:
        """What to store for ``memory``, and the near-duplicate that was there, if any.

        Nothing to store: it is a duplicate of that one. Both: store it, and wait until it can be
        searched for, inside the block; then the other one is deleted. A crash in between leaves
        both. Raises `PoolError` where the searcher can't be asked now.
        """
        if not self.watches(memory.pool):
            yield memory, None
            return
        with self._locks[memory.pool]:
            twin = self.find(memory)
            if twin is None or _key(twin) == _key(memory):
                yield memory, None  # equal ones are the store's affair
            elif not self._better(memory, twin):
                yield None, twin
            else:
                yield self._merged(memory, twin), twin
                if self._store.delete(twin.id):
                    self._searcher.notify(memory.pool)

    def find(self, memory: NewMemory) -> Memory | None:
        """The memory nearest to ``memory``, if it is near enough and neither held nor deleted."""
        settings = self._settings[memory.pool]
        assert settings.near_duplicate is not None
        try:
            answer = self._searcher.nearest(
                memory.pool, memory.prompt, memory.answer, 1, self._patience
            )
        except (SearchTimeout, SearcherClosed) as error:
            raise PoolError(f"near-duplicates can't be looked for: {error}") from error
        for hit in answer.hits:
            if hit.similarity >= settings.near_duplicate:
                return self._store.get(hit.id)
        return None

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
