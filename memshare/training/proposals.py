"""Who proposes candidates for a training query: BM25, and the retriever that serves.

BM25 finds what shares words with the query. It never proposes what is worded differently, so an
encoder that learns from it alone comes to prefer shared words too, and later rounds undo what the
first one taught. The serving retriever's own best memories show both what it has found beyond words
and what it takes for useful wrongly: as in ANCE (Xiong et al. 2021) and the iterations of LLM-R
(Wang et al. 2023). What each is worth is measured; being proposed decides nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memshare.config import Config
from memshare.pool.feedback import Feedback
from memshare.pool.store import PoolStore
from memshare.progress import log
from memshare.records import Memory, normalise
from memshare.retrieval.bm25 import BM25
from memshare.retrieval.text import memory_text
from memshare.training.rounds import may_be_there
from memshare.training.split import Fate

if TYPE_CHECKING:  # elsewhere where they are used: they load torch, and BM25 alone needs none
    from memshare.retrieval.encoder import Encoder
    from memshare.retrieval.generation import Generation


@dataclass(frozen=True, slots=True)
class Proposal:
    """A memory's id, and its rank (0, 1, ...) with each proposer; None: not proposed by it."""

    id: str
    bm25_rank: int | None
    dense_rank: int | None


@dataclass(frozen=True, eq=False)
class Proposer:
    """The encoder that proposes, and the generation it is from, if it is from one.

    ``name``: the generation's number (or of the one in whose place it proposes), the folder of an
    encoder that is in none, or `FROZEN` for the configured one.
    """

    encoder: Encoder
    generation: Generation | None
    name: int | str


def disliked(store: PoolStore, config: Config, pool: str) -> frozenset[str]:
    """Memories of ``pool`` whose standing is below ``mining.min_standing``.

    They are neither queries nor candidates, so that none is ever a positive.
    """
    floor = config.mining.min_standing
    standings = Feedback(store.database).of_pool(pool)
    return frozenset(id for id, standing in standings.items() if standing.value < floor)


@contextmanager
def open_proposer(
    config: Config, name: int | str | None, moved: str | None = None
) -> Iterator[Proposer | None]:
    """The proposer of this `Proposer.name` (None: what serves); None where vectors propose nothing.

    That is so without ``mining.dense_candidates``, and with ``labels: none``: nothing would tell
    whether the nearest memories are useful, and most of them are. In place of a generation that is
    gone what serves proposes, by that name, so that the round which began with it can go on: who
    publishes by hand meanwhile deletes old ones. In place of a folder that is gone ``moved`` does,
    where it is by now: a run folder may be moved. Raises `GenerationError`.
    """
    mining = config.mining
    if mining.dense_candidates == 0 or mining.labels == "none":
        yield None
        return
    from memshare.retrieval.encoder import Encoder
    from memshare.retrieval.generation import load, load_current
    from memshare.retrieval.manifest import NoGeneration
    from memshare.retrieval.serving import FROZEN

    if isinstance(name, str):
        model = name if moved is None or may_be_there(name) else moved
        yield Proposer(Encoder.load(config.encoder.model_copy(update={"model": model})), None, name)
        return
    home, device = config.retriever_dir, config.encoder.device
    generation = None
    if name is None:
        generation = load_current(home, device)
    elif name != FROZEN:
        try:
            generation = load(home, name, device)
        except NoGeneration as error:
            log(f"{error} any more; what serves now proposes in its place")
            generation = load_current(home, device)
    if generation is None:
        yield Proposer(Encoder.load(config.encoder), None, FROZEN if name is None else name)
        return
    with generation:
        generation.encoder.compute_as(config.encoder)
        number = generation.number if name is None else name
        yield Proposer(generation.encoder, generation, number)


class PoolProposals:
    """One pool's possible candidates: all but the held-out and disliked, up to a position."""

    def __init__(
        self,
        store: PoolStore,
        config: Config,
        pool: str,
        until: int,
        fates: Mapping[str, Fate],
        proposer: Proposer | None,
    ) -> None:
        """Reads the pool; encodes what the proposer's generation lacks.

        A memory without a fate came after the plan, and may be held out: it is no candidate.
        """
        self.pool = pool
        self._counts = config.mining.candidates, config.mining.dense_candidates
        out = disliked(store, config, pool)
        memories = [
            memory
            for memory in store.iter(pool, until_seq=until)
            if fates.get(memory.id, "held_out") != "held_out" and memory.id not in out
        ]
        self._ids = [memory.id for memory in memories]
        self._copies: dict[str, set[str]] = defaultdict(set)
        for memory in memories:
            self._copies[normalise(memory.prompt)].add(memory.id)
        texts = [memory_text(memory.prompt, memory.answer) for memory in memories]
        self._bm25 = BM25(config.bm25).fit(self._ids, texts)
        self._encoder = None if proposer is None else proposer.encoder
        if proposer is not None:
            from memshare.retrieval.build import memory_vectors
            from memshare.retrieval.index import FlatIndex

            vectors = memory_vectors(proposer.encoder, memories, proposer.generation)
            self._index = FlatIndex.build(vectors)

    def propose(self, queries: Sequence[Memory]) -> list[list[Proposal]]:
        """For each query BM25's best, then the proposer's others; never itself or a copy of it."""
        exclude = [{q.id, *self._copies.get(normalise(q.prompt), ())} for q in queries]
        prompts = [query.prompt for query in queries]
        words = [
            [memory_id for memory_id, _ in row]
            for row in self._bm25.top(prompts, self._counts[0], exclude)
        ]
        vectors = self._nearest(prompts, exclude)
        return [_merged(*row) for row in zip(words, vectors, strict=True)]

    def _nearest(self, prompts: Sequence[str], exclude: Sequence[set[str]]) -> list[list[str]]:
        if self._encoder is None or not self._ids or not prompts:
            return [[] for _ in prompts]
        count = self._counts[1]
        wide = min(len(self._ids), count + max(map(len, exclude)))
        _, rows = self._index.search(self._encoder.encode_queries(prompts), wide)
        return [
            [found for found in (self._ids[i] for i in row) if found not in out][:count]
            for row, out in zip(rows.tolist(), exclude, strict=True)
        ]


def _merged(words: Sequence[str], vectors: Sequence[str]) -> list[Proposal]:
    by_words = {memory_id: rank for rank, memory_id in enumerate(words)}
    by_vectors = {memory_id: rank for rank, memory_id in enumerate(vectors)}
    return [
        Proposal(memory_id, by_words.get(memory_id), by_vectors.get(memory_id))
        for memory_id in dict.fromkeys([*words, *vectors])
    ]
