"""Nothing is asked twice: answers and scores of single questions, kept by what decides them.

A key is a hash of the model's identity (weights by content, see `model_identity`), the whole prompt
and the settings of the call, so a result is found again after a kill, by another experiment, and
from another place in the same one; and it is never found where anything differs.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from memshare.files import open_cache
from memshare.llm.base import LLM, Chat, Completion, LogLikelihood, Message
from memshare.llm.inflight import InFlight

VERSION = 1  # part of every key: raise it when what is kept under a key changes
# The code around quoted text (`quoting`) is secret, so another one in every process; it says
# nothing that the text between does not.
_FENCE = re.compile("DATA [0-9a-f]{16}")


def content_hash(*parts: Any) -> str:
    """Hex digits that change with any of ``parts`` (JSON values)."""
    text = json.dumps([VERSION, *parts], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class ResultCache:
    """JSON values by key in one SQLite file; None keeps them for this process alone.

    Threads and processes may share it. ``hits`` counts what was found in it.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Raises `sqlite3.Error` where the file can't be opened."""
        self.hits = 0
        self._lock = threading.Lock()
        self._db = open_cache(path, "results (key TEXT PRIMARY KEY, value TEXT NOT NULL)")

    def get(self, key: str) -> Any:
        """The value kept under ``key``, or None."""
        with self._lock:
            row = self._db.execute("SELECT value FROM results WHERE key = ?", (key,)).fetchone()
            self.hits += row is not None
        return None if row is None else json.loads(row[0])

    def put(self, key: str, value: Any) -> None:
        """Keep ``value`` (not None); what stands there already stays."""
        text = json.dumps(value, ensure_ascii=False)
        with self._lock:
            self._db.execute("INSERT OR IGNORE INTO results VALUES (?, ?)", (key, text))

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()


class AroundLLM:
    """An LLM around another one: what it does not change is as the other's."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.model = llm.model

    @property
    def context_length(self) -> int:
        """As the LLM's."""
        return self.llm.context_length

    async def ready(self) -> None:
        """As the LLM's."""
        await self.llm.ready()

    def stream(self, chat: Chat) -> AsyncIterator[Mapping[str, Any]]:
        """As the LLM's."""
        return self.llm.stream(chat)

    def count_tokens(
        self, messages: Sequence[Message], extra: Mapping[str, Any] | None = None
    ) -> int:
        """As the LLM's."""
        return self.llm.count_tokens(messages, extra)

    async def aclose(self) -> None:
        """Close the LLM."""
        await self.llm.aclose()


class CachedLLM(AroundLLM):
    """An LLM that is not asked twice for the same thing. Follows `memshare.llm.base.LLM`.

    Calls in flight are shared too. A sample (temperature above 0) without a seed is a new one each
    time and goes through, as streams do. Errors are not kept: what failed is asked again. The cache
    is its maker's to close.
    """

    def __init__(self, llm: LLM, cache: ResultCache) -> None:
        super().__init__(llm)
        self._cache = cache
        self._flying = InFlight[Any]()

    async def chat(self, chat: Chat) -> Completion:
        """The answer, without the backend's raw reply."""

        async def ask() -> dict[str, Any]:
            completion = await self.llm.chat(chat)
            return {**asdict(completion), "raw": {}}

        if chat.temperature > 0 and chat.seed is None:
            return Completion(**await ask())
        return Completion(**await self._once(("chat", asdict(chat)), ask))

    async def loglikelihood(self, context: Sequence[Message], continuation: str) -> LogLikelihood:
        """Log-likelihood of ``continuation`` as the reply to ``context``."""

        async def ask() -> list[float]:
            return list(await self.llm.loglikelihood(context, continuation))

        total, tokens = await self._once(("loglikelihood", list(context), continuation), ask)
        return LogLikelihood(total, int(tokens))

    async def label_probabilities(
        self, context: Sequence[Message], labels: Sequence[str]
    ) -> list[float]:
        """Probability of each label."""

        async def ask() -> list[float]:
            return await self.llm.label_probabilities(context, labels)

        found: list[float] = await self._once(("labels", list(context), list(labels)), ask)
        return found

    async def _once(self, call: Sequence[Any], ask: Callable[[], Awaitable[Any]]) -> Any:
        key = content_hash(self.model, _FENCE.sub("DATA", json.dumps(call, sort_keys=True)))
        if (known := self._cache.get(key)) is not None:
            return known
        return await self._flying.share(key, lambda: self._ask(key, ask))

    async def _ask(self, key: str, ask: Callable[[], Awaitable[Any]]) -> Any:
        value = await ask()
        self._cache.put(key, value)
        return value


def cached(llm: LLM, path: Path | None = None) -> CachedLLM:
    """``llm`` behind a cache of its own: in memory, or in the file ``path``."""
    return CachedLLM(llm, ResultCache(path))
