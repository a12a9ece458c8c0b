"""The content check of swaps: does every answer belong to the one generation that it names?

Two encoders give unrelated spaces, so a query vector of one searched in the other's index finds
other memories with other similarities than either generation alone would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from memshare.records import SearchAnswer
from memshare.retrieval.encoder import Encoder

Pairs = Sequence[tuple[str, str, str]]  # id, prompt, answer


@dataclass(frozen=True)
class Expected:
    """Similarities (questions, memories) by one encoder, over memories that never change."""

    similarities: np.ndarray
    ids: list[str]

    @classmethod
    def of(cls, encoder: Encoder, questions: Sequence[str], memories: Pairs) -> Expected:
        vectors = encoder.encode_memories([(prompt, answer) for _, prompt, answer in memories])
        return cls(encoder.encode_queries(questions) @ vectors.T, [id for id, _, _ in memories])


def mixed(
    answer: SearchAnswer, question: int, expected: Mapping[int, Expected], k: int
) -> str | None:
    """None if ``answer`` is what its generation alone would give, else what is wrong with it.

    Memories that ``expected`` does not know (written during the test) are passed over.
    """
    model = expected.get(answer.generation)
    if model is None:
        return f"unknown generation {answer.generation}"
    by_id = dict(zip(model.ids, model.similarities[question].tolist(), strict=True))
    known = [hit for hit in answer.hits if hit.id in by_id]
    for hit in known:
        if abs(hit.similarity - by_id[hit.id]) > 1e-4:
            return f"{hit.id}: similarity {hit.similarity} instead of {by_id[hit.id]}"
    if len(answer.hits) != k:
        return f"{len(answer.hits)} hits instead of {k}"
    floor = min((hit.similarity for hit in answer.hits), default=1.0)
    found = {hit.id for hit in known}
    for id, similarity in by_id.items():
        if similarity > floor + 1e-4 and id not in found:
            return f"{id} with {similarity} is missing"
    return None
