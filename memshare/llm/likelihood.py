"""P(y | candidate, x): how likely an answer becomes when memories are shown before its question.

The score that labels training data (step 5 of the loop; Rubin et al., "Learning To Retrieve
Prompts for In-Context Learning", 2022): mean log-likelihood per token, in nats. Nothing is ever
scored twice: results are kept by model and content, and equal requests in flight share one call.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from memshare.files import open_cache
from memshare.llm.base import LLM, LogLikelihood
from memshare.llm.inflight import InFlight
from memshare.llm.prompts import few_shot

_VERSION = 1  # part of every key: raise it when the prompt around the texts changes


class LikelihoodCache:
    """Likelihoods in one SQLite file; threads and processes may share it.

    Raises `sqlite3.Error` where the file can't be opened or written.
    """

    def __init__(self, path: Path, base: Path | None = None) -> None:
        """``base``: another cache's file, which is looked up too, if it is there, and never locked.

        So the nodes of a shared file system may all have it. Who writes it meanwhile costs them
        entries at most: those that aren't seen are measured again.
        """
        self._lock = threading.Lock()
        columns = "key BLOB PRIMARY KEY, sum REAL NOT NULL, tokens INTEGER NOT NULL"
        self._db = open_cache(path, f"likelihoods ({columns})")
        self._base: sqlite3.Connection | None = None
        if base is not None and base.exists():
            # Immutable: without locks, and without the shared memory that a WAL asks for.
            uri = f"{base.absolute().as_uri()}?mode=ro&immutable=1"
            self._base = sqlite3.connect(uri, uri=True, check_same_thread=False)

    def get(self, key: bytes) -> LogLikelihood | None:
        """What was measured for ``key``, if anything was."""
        with self._lock:
            found = _look_up(self._db, key)
            if found is None and self._base is not None:
                # Rows are never changed and lie beside their keys: one that is found is right, also
                # in a file that is being written. What is not may be an error.
                with suppress(sqlite3.DatabaseError):
                    found = _look_up(self._base, key)
        return found

    def put(self, key: bytes, value: LogLikelihood) -> None:
        """Keep ``value``; what another process stored meanwhile stays."""
        with self._lock:
            self._db.execute(
                "INSERT OR IGNORE INTO likelihoods VALUES (?, ?, ?)", (key, value.sum, value.tokens)
            )

    def absorb(self, other: Path) -> None:
        """Take over what the cache file ``other`` knows; nothing where there is no such file."""
        if not other.exists():
            return
        LikelihoodCache(other).close()  # one whose owner was killed first of all has no table yet
        with self._lock:
            self._db.execute("ATTACH DATABASE ? AS other", (str(other),))
            try:
                self._db.execute(
                    "INSERT OR IGNORE INTO likelihoods SELECT * FROM other.likelihoods"
                )
            finally:
                self._db.execute("DETACH DATABASE other")

    def __len__(self) -> int:
        with self._lock:
            return int(self._db.execute("SELECT count(*) FROM likelihoods").fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()
            if self._base is not None:
                self._base.close()


def _look_up(db: sqlite3.Connection, key: bytes) -> LogLikelihood | None:
    row = db.execute("SELECT sum, tokens FROM likelihoods WHERE key = ?", (key,)).fetchone()
    return None if row is None else LogLikelihood(float(row[0]), int(row[1]))


class Likelihood:
    """Measures answers with the scorer LLM. ``measured`` counts the calls that reached it.

    ``instruction`` is the system turn that the agents use too, or empty.
    """

    def __init__(
        self, llm: LLM, cache: LikelihoodCache | None = None, instruction: str = ""
    ) -> None:
        self.llm = llm
        self.cache = cache
        self.instruction = instruction
        self.measured = 0
        self._flying = InFlight[LogLikelihood]()

    async def score(
        self, query_prompt: str, answer: str, shots: Sequence[tuple[str, str]] = ()
    ) -> float:
        """Mean nats per token of ``answer`` to ``query_prompt`` after ``shots`` (best first).

        Raises `ContextTooLong` if all of it doesn't fit the model, `LLMError` for an empty answer.
        """
        return (await self.measure(query_prompt, answer, shots)).mean

    async def baseline(self, query_prompt: str, answer: str) -> float:
        """The same with no memory shown: what a positive must beat."""
        return await self.score(query_prompt, answer, ())

    async def measure(
        self, query_prompt: str, answer: str, shots: Sequence[tuple[str, str]]
    ) -> LogLikelihood:
        """Sum and token count instead of the mean."""
        key = self._key(query_prompt, answer, shots)
        if self.cache is not None and (known := self.cache.get(key)) is not None:
            return known
        return await self._flying.share(
            key, lambda: self._measure(key, query_prompt, answer, shots)
        )

    async def _measure(
        self, key: bytes, query_prompt: str, answer: str, shots: Sequence[tuple[str, str]]
    ) -> LogLikelihood:
        messages = few_shot(self.instruction, shots, query_prompt)
        self.measured += 1
        value = await self.llm.loglikelihood(messages, answer)
        if self.cache is not None:
            self.cache.put(key, value)
        return value

    def _key(self, query_prompt: str, answer: str, shots: Sequence[tuple[str, str]]) -> bytes:
        parts = [_VERSION, self.llm.model, self.instruction, list(shots), query_prompt, answer]
        return hashlib.sha256(json.dumps(parts).encode()).digest()
