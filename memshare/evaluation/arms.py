"""The measurements that experiments share: answers by number of shots, retrieval, growth.

An arm is one way of answering the same test questions; arms are compared question by question.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memshare.config import Config
from memshare.evaluation.data import Pair
from memshare.evaluation.rankers import Ranker
from memshare.llm.agent import Agent
from memshare.llm.base import Completion, LLMError
from memshare.metrics.bertscore import BertScore, BertScorer
from memshare.metrics.ir import ir_metrics
from memshare.metrics.stats import bootstrap_mean
from memshare.records import Memory

SHOT_NAMES = ("zero_shot", "one_shot", "two_shot", "three_shot")


@dataclass(frozen=True)
class Arm:
    """Answers and their BERTScore, by test question; a failed one (an LLM error) scores zero."""

    scores: Sequence[BertScore]
    answers: Sequence[str | None]  # None: failed

    @property
    def f1(self) -> list[float]:
        """F1 by question."""
        return [score.f1 for score in self.scores]

    @property
    def failed(self) -> int:
        """How many questions got no answer."""
        return sum(answer is None for answer in self.answers)

    def part(self, at: Sequence[int]) -> Arm:
        """The arm over some of its questions."""
        return Arm([self.scores[i] for i in at], [self.answers[i] for i in at])

    def summary(self, seed: int) -> dict[str, Any]:
        """Means, the 95 % bootstrap interval of F1, and the count of questions and failures."""
        interval = bootstrap_mean(self.f1, seed=seed)
        n = len(self.scores)
        return {
            "precision": sum(score.precision for score in self.scores) / n,
            "recall": sum(score.recall for score in self.scores) / n,
            "f1": interval.mean,
            "f1_low": interval.low,
            "f1_high": interval.high,
            "n": n,
            "failed": self.failed,
        }


def sampling_seed(config: Config) -> int | None:
    """What samples of answers are drawn by, so that none is asked for twice.

    None where nothing is sampled: not every endpoint knows a seed.
    """
    return config.run.seed if config.agent.temperature > 0 else None


async def answer_all(
    agent: Agent,
    tests: Sequence[Pair],
    shots: Sequence[Sequence[Memory]],
    seed: int | None = None,
) -> list[Completion | None]:
    """Each test answered with its own shots (best first); None where the LLM failed."""

    async def one(test: Pair, memories: Sequence[Memory]) -> Completion | None:
        try:
            return (await agent.answer(test.prompt, memories, seed)).completion
        except LLMError:
            return None  # counted and shown, never dropped

    return await asyncio.gather(*(one(t, m) for t, m in zip(tests, shots, strict=True)))


async def answer_arm(
    agent: Agent, scorer: BertScorer, tests: Sequence[Pair], shots: Sequence[Sequence[Memory]]
) -> Arm:
    """Answer each test with its own shots (best first) and score against the reference."""
    answers = await answer_all(agent, tests, shots)
    texts = [answer.text if answer else "" for answer in answers]
    scores = await asyncio.to_thread(scorer.score, texts, [test.answer for test in tests])
    return Arm(scores, [answer.text if answer else None for answer in answers])


async def shot_arms(
    agent: Agent, scorer: BertScorer, tests: Sequence[Pair], ranked: Sequence[Sequence[Memory]]
) -> dict[str, Arm]:
    """One arm for each number of shots, the first n of every question's ranked memories."""
    return {
        name: await answer_arm(agent, scorer, tests, [row[:n] for row in ranked])
        for n, name in enumerate(SHOT_NAMES)
    }


def ranked_memories(
    ranker: Ranker, memories: Mapping[str, Memory], questions: Sequence[str], k: int
) -> list[list[Memory]]:
    """The k best memories of every question."""
    return [[memories[id_] for id_ in row] for row in ranker(questions, k)]


def retrieval(
    rankers: Mapping[str, Ranker], questions: Sequence[str], relevant: Sequence[set[str]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Every retriever's metrics by question number: name -> question -> metric -> value."""
    qrels = {str(i): dict.fromkeys(ids, 1) for i, ids in enumerate(relevant)}
    return {
        name: ir_metrics({str(i): row for i, row in enumerate(ranker(questions, 10))}, qrels)
        for name, ranker in rankers.items()
    }
