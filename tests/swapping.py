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
_TOLERANCE = 1e-4  # far more than float32 rounds, far less than two encoders differ


@dataclass(frozen=True)
class Expected:
    """Similarities (questions, memories) by one encoder.

    The first ``steady`` memories are there all the time, so that each of them that belongs in an
    answer must be in it; the others came while answers were given.
    """

    similarities: np.ndarray
    columns: dict[str, int]
    steady: int

    @classmethod
    def of(
        cls, encoder: Encoder, questions: Sequence[str], memories: Pairs, steady: int | None = None
    ) -> Expected:
        """``steady`` None: all of ``memories`` never change."""
        vectors = encoder.encode_memories([(prompt, answer) for _, prompt, answer in memories])
        return cls(
            encoder.encode_queries(questions) @ vectors.T,
            {id: column for column, (id, _, _) in enumerate(memories)},
            len(memories) if steady is None else steady,
        )


def mixed(
    answer: SearchAnswer, question: int, expected: Mapping[int, Expected], k: int
) -> str | None:
    """None if ``answer`` is what its generation alone would give, else what is wrong with it.

    Memories that ``expected`` does not know (written during the test) are passed over.
    """
    model = expected.get(answer.generation)
    if model is None:
        return f"unknown generation {answer.generation}"
    row = model.similarities[question]
    known = [(hit, model.columns[hit.id]) for hit in answer.hits if hit.id in model.columns]
    for hit, column in known:
        if abs(hit.similarity - row[column]) > _TOLERANCE:
            return f"{hit.id}: similarity {hit.similarity} instead of {row[column]}"
    if len(answer.hits) != k:
        return f"{len(answer.hits)} hits instead of {k}"
    floor = min((hit.similarity for hit in answer.hits), default=1.0)
    better = set(np.flatnonzero(row[: model.steady] > floor + _TOLERANCE).tolist())
    missing = better - {column for _, column in known}
    if missing:
        return f"{len(missing)} memories more similar than {floor} are missing"
    return None
