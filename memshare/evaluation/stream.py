"""A pool under a cap while memories stream in: the evidence that searches leave, and what goes.

The policies are `memshare.pruning`'s own; what they are told is gathered in memory instead of in a
database, so that many caps and policies can be tried on one stream.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np

from memshare.arrays import Floats
from memshare.pool.feedback import NEUTRAL_VOTES
from memshare.pruning.agreement import signatures
from memshare.pruning.evidence import Entry, Evidence
from memshare.pruning.policies import Policy
from memshare.pruning.prune import SLACK
from memshare.records import Memory, normalise

PER_DAY = 24  # memories a day, by the stream's clock
Gain = Callable[[Memory, Memory], Awaitable[float | None]]  # the first one shown to the second


@dataclass(frozen=True)
class Stream:
    """Memories in their order of arrival.

    ``queries``, ``vectors``: (memories, dim) unit rows of their questions and of the memories.
    ``votes``: what the asker of the second thinks of the first when it is shown, -1 to 1; None
    where nobody can say.
    """

    memories: Sequence[Memory]
    queries: Floats
    vectors: Floats
    votes: Callable[[Memory, Memory], float] | None


class Observed(Evidence):
    """The evidence of a stream so far. Rows are places in the stream."""

    def __init__(self, stream: Stream, threshold: float) -> None:
        self.pool, self.threshold = stream.memories[0].pool, threshold
        self.alive: list[int] = []
        self._stream = stream
        self._arrived = 0
        self._copies = defaultdict[str, list[int]](list)
        for row, memory in enumerate(stream.memories):
            self._copies[normalise(memory.prompt)].append(row)
        self._signatures = signatures(memory.answer for memory in stream.memories)
        self._uses = Counter[str]()
        self._votes = defaultdict[str, list[float]](list)
        self._gains = dict[str, tuple[float, int]]()
        self.uses, self.gains = self._uses, self._gains  # what policies may read, and only read

    def search(self, rows: Sequence[int], k: int) -> list[list[int]]:
        """The k living memories nearest to the question of each row, its copies left out."""
        alive = np.array(self.alive, dtype=np.int64)
        cosines = self._stream.queries[rows] @ self._stream.vectors[alive].T
        shown = []
        for row, line in zip(rows, cosines, strict=True):
            copies = self._copies[normalise(self._stream.memories[row].prompt)]
            line[np.isin(alive, copies)] = -np.inf
            best = np.argsort(-line, kind="stable")[:k]
            shown.append(alive[best[np.isfinite(line[best])]].tolist())
        return shown

    def tell(self, place: int, row: int, gain: float | None) -> None:
        """Keep that ``place`` was found for ``row``; ``gain``: how much it helped, if measured."""
        memory = self._stream.memories[place]
        self._uses[memory.id] += 1
        if self._stream.votes is not None:
            self._votes[memory.id].append(self._stream.votes(memory, self._stream.memories[row]))
        if gain is not None:
            total, number = self._gains.get(memory.id, (0.0, 0))
            self._gains[memory.id] = total + gain, number + 1

    def arrive(self, rows: Sequence[int]) -> None:
        """Take the rows into the pool."""
        self.alive += rows
        self._arrived += len(rows)

    def hold(self, cap: int, policy: Policy) -> None:
        """Beyond ``cap``, prune to somewhat below it, as the loop does (`pruning.hold_caps`)."""
        if len(self.alive) <= cap:
            return
        now = datetime.now(UTC)
        memories = [self._stream.memories[row] for row in self.alive]
        ages = [timedelta(days=(self._arrived - 1 - row) / PER_DAY) for row in self.alive]
        self.entries = tuple(
            Entry(memory.id, memory.seq, memory.score, (now - age).isoformat())
            for memory, age in zip(memories, ages, strict=True)
        )
        self.vectors = self._stream.vectors[self.alive]
        self.questions = self._stream.queries[self.alive]
        self.answers = self._signatures[self.alive]
        self.standings = {id_: sum(votes) / (len(votes) + NEUTRAL_VOTES)
                          for id_, votes in self._votes.items()}  # fmt: skip
        self.excess = len(self.alive) - max(1, int(cap * (1 - SLACK)))
        gone = set(list(policy(self))[: self.excess])
        self.alive = [row for row, m in zip(self.alive, memories, strict=True) if m.id not in gone]


async def survivors(
    stream: Stream, seeds: int, cap: int, policy: Policy, threshold: float, *,
    shots: int, batch: int, gain: Gain | None = None,
) -> list[Memory]:  # fmt: skip
    """What is left of ``stream`` at its end in a pool of at most ``cap`` memories.

    The first ``seeds`` memories are there from the start; each later one is a question first, for
    which the pool is searched, ``batch`` at a time. ``gain``: measures what a memory that was found
    added to the likelihood of the answer that arrives, in nats per token; None: nobody measures.
    """
    memories = stream.memories
    seen = Observed(stream, threshold)
    seen.arrive(range(seeds))
    seen.hold(cap, policy)
    for start in range(seeds, len(memories), batch):
        rows = range(start, min(start + batch, len(memories)))
        found = seen.search(rows, shots)
        pairs = [(place, row) for row, line in zip(rows, found, strict=True) for place in line]
        gains: list[float | None] = [None] * len(pairs)
        if gain is not None:
            measured = (gain(memories[place], memories[row]) for place, row in pairs)
            gains = await asyncio.gather(*measured)
        for (place, row), value in zip(pairs, gains, strict=True):
            seen.tell(place, row, value)
        seen.arrive(rows)
        seen.hold(cap, policy)
    return [memories[row] for row in seen.alive]
