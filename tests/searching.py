"""A searcher in a process of its own, which can be killed at any moment, whatever it is doing."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from typing import Any

from memshare.config import Config
from memshare.pool.store import PoolStore
from memshare.records import SearchAnswer
from memshare.retrieval.searcher import Searcher
from tests.retrieving import open_store

_WAIT_SECONDS = 60.0
# Forked from a process that has imported all of it, transformers' lazy parts too: a start takes a
# moment, not seconds.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__, "tests.tiny"])


class SearcherProcess:
    """A store and a searcher over it, as a gateway has them."""

    def __init__(self, config: Config) -> None:
        """Start; the first search waits until something is loaded."""
        self._pipe, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(config, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def begin(self, method: str, *arguments: Any) -> None:
        """Ask for a method of `_Parts`, and wait for nothing."""
        self._pipe.send((method, arguments))

    def call(self, method: str, *arguments: Any) -> Any:
        """What the method returns; raises what it raised."""
        self.begin(method, *arguments)
        assert self._pipe.poll(_WAIT_SECONDS), f"{method}: no answer"
        result = self._pipe.recv()
        if isinstance(result, BaseException):
            raise result
        return result

    def kill(self) -> None:
        """``kill -9``."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


class _Parts:
    """What can be asked for in that process, beside every method of the store."""

    def __init__(self, store: PoolStore, searcher: Searcher) -> None:
        self._store, self._searcher = store, searcher

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def look(self, pool: str, query: str, k: int) -> tuple[int, SearchAnswer]:
        """An answer, and the pool's position as it was told before; 0 while nothing is loaded."""
        position = self._searcher.stats().positions.get(pool, 0)
        return position, self._searcher.search(pool, query, k)

    def wait_visible(self, pool: str, seq: int) -> None:
        self._searcher.wait_visible(pool, seq, _WAIT_SECONDS)

    def generation(self) -> int | None:
        return self._searcher.stats().generation


def _serve(config: Config, pipe: Connection) -> None:
    with open_store(config) as store, Searcher(store, config) as searcher:
        parts = _Parts(store, searcher)
        while True:
            method, arguments = pipe.recv()
            try:
                pipe.send(getattr(parts, method)(*arguments))
            except Exception as error:
                pipe.send(error)
