from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from memshare.config import load_config
from memshare.evaluation.data import Domain, Pair
from memshare.evaluation.experiments.retriever import oracle
from memshare.evaluation.material import as_memories
from memshare.llm.base import LogLikelihood, Message


class Likes:
    """An LM to which an answer is as likely as the memory shown is long."""

    model = "lm"

    async def loglikelihood(self, context: Sequence[Message], continuation: str) -> LogLikelihood:
        return LogLikelihood(float(len(str(context))), 1)


def test_an_oracle_ranks_what_words_alone_propose() -> None:
    """With `mining.dense_candidates: 0` nothing is to be asked of the encoder."""
    memories = as_memories("pool", [Pair("short", "a"), Pair("much longer", "a"), Pair("x", "a")])
    domain = Domain("pool", (), (), {"tests": (Pair("question", "answer"),)})
    lab: Any = SimpleNamespace(
        config=load_config(None, ["mining.candidates=2", "mining.dense_candidates=0"]),
        scorer_llm=Likes(),
    )
    ids = [memory.id for memory in memories]

    def words(questions: Sequence[str], k: int) -> list[list[str]]:
        return [ids[:k] for _ in questions]

    def vectors(questions: Sequence[str], k: int) -> list[list[str]]:
        assert k > 0
        return [ids[:k] for _ in questions]

    ranker = asyncio.run(oracle(lab, domain, memories, [words, vectors]))
    assert ranker(["question"], 3) == [[ids[1], ids[0]]]
