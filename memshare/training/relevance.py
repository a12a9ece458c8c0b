"""How relevant a memory is to a held-out question: what the gate and the evaluation judge by.

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
from memshare.records import Candidate, Example, Memory
from memshare.retrieval.text import tokenize
from memshare.training.labels import Labeller, check_labels, open_labeller, same_label


def answer_overlap(left: str, right: str) -> float:
    """F1 of two texts' word multisets, in 0..1."""
    a, b = Counter(tokenize(left)), Counter(tokenize(right))
    common = (a & b).total()
    return 2 * common / (a.total() + b.total()) if common else 0.0


async def _overlap(query: Memory, candidate: Memory | None) -> float | None:
    assert candidate is not None
    return answer_overlap(query.answer, candidate.answer)


def judging(labeller: Labeller) -> Labeller:
    """What measures candidates of held-out queries: ``labeller``, or words where it measures none.

    `mined_gains` reads what it measured.
    """
    return labeller if labeller.measure else Labeller("answer overlap", _overlap, False)


def mined_gains(example: Example, candidates: Sequence[Candidate]) -> list[float]:
    """Gains of some of a held-out example's candidates, from what `judging` measured of them.

    They are those that the gate would find; 0 where nothing could be measured.
    """
    worth = [candidate.loglik for candidate in candidates]
    if example.labels == "given":
        return [float(value is not None and value >= 0.0) for value in worth]
    return _over(worth, example.baseline_loglik, example.labels)


class HeldOutRelevance:
    """Gains of candidates for a held-out query; called concurrently in one event loop.

    The labeller's LLMs are opened by the first call and closed when no call is under way any more,
    all in the loop that uses them.
    """

    def __init__(self, config: Config, store: PoolStore) -> None:
        """Opens nothing yet. Raises `ConfigError` where nothing could be judged."""
        check_labels(config)
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
            return await _gains(labeller, labels, query, candidates)
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
    labeller: Labeller, labels: str, query: Memory, candidates: Sequence[Memory]
) -> list[float]:
    measure = labeller.measure
    assert measure is not None
    worth = await asyncio.gather(*(measure(query, item) for item in candidates))
    baseline = await measure(query, None) if labeller.has_baseline else None
    return _over(worth, baseline, labels)


def _over(worth: Sequence[float | None], baseline: float | None, labels: str) -> list[float]:
    """Gains from what a labeller of the kind ``labels`` measured; 0 where it measured nothing.

    What is not finite is nothing, as in training.
    """
    known = [None if value is None or not math.isfinite(value) else value for value in worth]
    if labels == "prompted":  # a log probability
        return [0.0 if value is None else math.exp(value) for value in known]
    if labels == "none":  # an overlap
        return [value or 0.0 for value in known]
    if baseline is None or not math.isfinite(baseline):
        return [0.0] * len(known)
    return [0.0 if value is None else value - baseline for value in known]
