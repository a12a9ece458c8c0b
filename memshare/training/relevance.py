"""How relevant a memory is to a held-out question: what the gate judges by.

By the kind of labels that training uses, so that the gate measures what was trained for:

* ``likelihood``, ``reward``: the gain of showing the memory over showing none;
* ``given``: 1 for the same label, else 0;
* ``prompted``: the probability that the scorer states;
* ``none``: no LLM and no labels, so the share of words that the two answers have in common (F1 of
  their word multisets, as in SQuAD); only gains above `gate.gain` count, graded against the best.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack

from memshare.config import Config
from memshare.pool.store import PoolStore
from memshare.records import Memory
from memshare.retrieval.text import tokenize
from memshare.training.labels import Labeller, Measure, open_labeller, same_label


def answer_overlap(left: str, right: str) -> float:
    """F1 of two texts' word multisets, in 0..1."""
    a, b = Counter(tokenize(left)), Counter(tokenize(right))
    common = (a & b).total()
    return 2 * common / (a.total() + b.total()) if common else 0.0


class HeldOutRelevance:
    """Gains of candidates for a held-out query; called concurrently in one event loop.

    The labeller's LLMs are opened by the first call and closed when no call is under way any more,
    all in the loop that uses them.
    """

    def __init__(self, config: Config, store: PoolStore) -> None:
        """Opens nothing yet."""
        self._config = config
        self._store = store
        self._lock: asyncio.Lock | None = None
        self._stack = AsyncExitStack()
        self._labeller: Labeller | None = None
        self._users = 0

    async def __call__(self, query: Memory, candidates: Sequence[Memory]) -> list[float]:
        """One gain a candidate; 0 where nothing could be measured."""
        labels = self._config.mining.labels
        if labels == "none":
            return [answer_overlap(query.answer, item.answer) for item in candidates]
        if labels == "given":
            key = self._config.mining.given_key
            return [float(same_label(query, item, key)) for item in candidates]
        self._users += 1
        try:
            labeller = await self._open()
            assert labeller.measure is not None
            return await _gains(labeller.measure, labeller.has_baseline, query, candidates)
        finally:
            self._users -= 1
            if self._users == 0:
                self._labeller = self._lock = None
                await self._stack.aclose()

    async def _open(self) -> Labeller:
        self._lock = self._lock or asyncio.Lock()
        async with self._lock:
            if self._labeller is None:
                opening = open_labeller(self._config, self._store)
                self._labeller = await self._stack.enter_async_context(opening)
            return self._labeller


async def _gains(
    measure: Measure, has_baseline: bool, query: Memory, candidates: Sequence[Memory]
) -> list[float]:
    worth = await asyncio.gather(*(measure(query, item) for item in candidates))
    if not has_baseline:  # prompted: a log probability
        return [0.0 if value is None else math.exp(value) for value in worth]
    baseline = await measure(query, None)
    if baseline is None:
        return [0.0] * len(candidates)
    return [0.0 if value is None else value - baseline for value in worth]
