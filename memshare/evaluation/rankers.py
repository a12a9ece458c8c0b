"""The retrievers that experiments compare, behind one call: rank a fixed set of memories.

Ranks are ids, best first, and never hold the query's own copy: a question is not answered with
itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from memshare.config import BM25Config
from memshare.records import Memory, normalise
from memshare.retrieval.bm25 import BM25
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.index import FlatIndex
from memshare.retrieval.text import memory_text

_FUSION = 60  # the paper's constant: how little the very first ranks are favoured


class Ranker(Protocol):
    """Ranks memories for questions."""

    def __call__(self, questions: Sequence[str], k: int) -> list[list[str]]:
        """At most k ids for each question, best first."""
        ...


def _copies(memories: Sequence[Memory]) -> Callable[[str], set[str]]:
    by_prompt: dict[str, set[str]] = {}
    for memory in memories:
        by_prompt.setdefault(normalise(memory.prompt), set()).add(memory.id)
    return lambda question: by_prompt.get(normalise(question), set())


def random_ranker(memories: Sequence[Memory], seed: int) -> Ranker:
    """Uniform draws without replacement, one stream for each question's text and the seed."""
    ids = [memory.id for memory in memories]
    copies = _copies(memories)

    def rank(questions: Sequence[str], k: int) -> list[list[str]]:
        ranks = []
        for question in questions:
            rng = np.random.default_rng([seed, *question.encode()])
            excluded = copies(question)
            ranks.append([ids[i] for i in rng.permutation(len(ids)) if ids[i] not in excluded][:k])
        return ranks

    return rank


def bm25_ranker(memories: Sequence[Memory], config: BM25Config | None = None) -> Ranker:
    """BM25+ of the question against prompt and answer."""
    index = BM25(config or BM25Config())
    index.fit([m.id for m in memories], [memory_text(m.prompt, m.answer) for m in memories])
    copies = _copies(memories)

    def rank(questions: Sequence[str], k: int) -> list[list[str]]:
        found = index.top(questions, k, exclude=[copies(question) for question in questions])
        return [[id_ for id_, _ in row] for row in found]

    return rank


def fused_ranker(rankers: Sequence[Ranker], depth: int = 100) -> Ranker:
    """Reciprocal rank fusion (Cormack et al. 2009) of the first ``depth`` of each ranker."""

    def rank(questions: Sequence[str], k: int) -> list[list[str]]:
        fused = []
        for rows in zip(*(ranker(questions, max(k, depth)) for ranker in rankers), strict=True):
            scores: dict[str, float] = {}
            for row in rows:
                for place, id_ in enumerate(row, 1):
                    scores[id_] = scores.get(id_, 0.0) + 1.0 / (_FUSION + place)
            fused.append(sorted(scores, key=lambda id_: -scores[id_])[:k])
        return fused

    return rank


def dense_ranker(
    memories: Sequence[Memory], encoder: Encoder, vectors: np.ndarray | None = None
) -> Ranker:
    """Exact inner products of ``encoder``'s unit vectors.

    ``vectors`` (memories, dim): the memories' vectors, if ``encoder`` has made them already.
    """
    ids = [memory.id for memory in memories]
    if vectors is None:
        vectors = encoder.encode_memories([(m.prompt, m.answer) for m in memories])
    index = FlatIndex.build(vectors)
    copies = _copies(memories)

    def rank(questions: Sequence[str], k: int) -> list[list[str]]:
        excluded = [copies(question) for question in questions]
        widest = k + max((len(e) for e in excluded), default=0)
        _, rows = index.search(encoder.encode_queries(questions), widest)
        return [
            [ids[row] for row in found if row >= 0 and ids[row] not in out][:k]
            for found, out in zip(rows, excluded, strict=True)
        ]

    return rank
