"""A pool that grows by the agents' own answers: the loop's steps 1 to 4 over a list of problems.

Problems come in their order, some at a time, as from agents that work side by side: those of one
batch don't see each other's answers. What the scorer accepts is a memory for the batches after it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from memshare.evaluation.arms import answer_all, ranked_memories, sampling_seed
from memshare.evaluation.data import Domain, Pair
from memshare.evaluation.lab import Lab
from memshare.evaluation.material import as_memories
from memshare.llm.agent import Agent
from memshare.llm.base import Completion, LLMError, LLMUnavailable
from memshare.llm.rubric import load_rubric
from memshare.llm.scorer import Scorer
from memshare.progress import log
from memshare.records import Grade, Memory
from memshare.sharing import turn as ends

BATCH = 32
SHOTS = 3
FAILED = "failed"  # the LLM gave no answer


@dataclass(frozen=True)
class Answered:
    """One problem with an agent's own answer (None: it failed).

    ``agent``: which of the agents, by its place among them.
    """

    problem: Pair
    agent: int
    completion: Completion | None

    @property
    def pair(self) -> Pair:
        """The problem with what the agent answered."""
        return Pair(self.problem.prompt, self.completion.text.strip() if self.completion else "")

    @property
    def unusable(self) -> str | None:
        """Why it is not graded, as none of the loop's are then (`Writer.hopeless`); None: it is."""
        if self.completion is None:
            return FAILED
        if not self.pair.answer:
            return ends.EMPTY
        if self.completion.finish_reason == "length":
            return ends.CUT_OFF
        return None if self.completion.finish_reason == "stop" else ends.UNFINISHED


@dataclass(frozen=True)
class Attempt(Answered):
    """An answer with the scorer's grade."""

    grade: Grade


@dataclass
class Grown:
    """The pool afterwards, seed memories first, and how each problem ended.

    ``stored``: the attempts that became memories.
    """

    memories: list[Memory]
    attempts: list[Attempt] = field(default_factory=list)
    stored: list[Attempt] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)


def pool_settings(lab: Lab, pool: str) -> tuple[str, float]:
    """Rubric text and threshold of a pool; one that is not configured is as the first that is."""
    settings = lab.config.pools.get(pool, next(iter(lab.config.pools.values())))
    return load_rubric(settings.rubric), settings.threshold


async def answered(
    lab: Lab, agents: Sequence[Agent], problems: Sequence[Pair], memories: Sequence[Memory]
) -> list[Answered]:
    """Every problem answered from ``memories``; the agents take turns."""
    shots = await _shots(lab, problems, memories)
    turns = [place % len(agents) for place in range(len(problems))]
    completions: list[Completion | None] = [None] * len(problems)
    for number, agent in enumerate(agents):
        at = [place for place, turn in enumerate(turns) if turn == number]
        found = await answer_all(
            agent, [problems[i] for i in at], [shots[i] for i in at], sampling_seed(lab.config)
        )
        for i, completion in zip(at, found, strict=True):
            completions[i] = completion
    return [Answered(*row) for row in zip(problems, turns, completions, strict=True)]


async def graded(lab: Lab, scorer: Scorer, pool: str, answers: Sequence[Answered]) -> list[Attempt]:
    """The answers with their grades, by the pool's rubric."""
    rubric, _ = pool_settings(lab, pool)

    async def one(item: Answered) -> Attempt:
        if item.unusable:
            found = Grade(None, item.unusable)
        else:
            found = await grade(scorer, *item.pair, rubric)
        return Attempt(item.problem, item.agent, item.completion, found)

    return await asyncio.gather(*map(one, answers))


async def grade(scorer: Scorer, prompt: str, answer: str, rubric: str) -> Grade:
    """The scorer's grade; none where it refuses the pair. Raises `LLMUnavailable`."""
    try:
        return await scorer.grade(prompt, answer, rubric)
    except LLMUnavailable:
        raise
    except LLMError as error:  # this pair can't be graded; asking again won't help
        log(f"not graded: {error}")
        return Grade(None, ends.REFUSED)


async def _shots(
    lab: Lab, problems: Sequence[Pair], memories: Sequence[Memory]
) -> Sequence[Sequence[Memory]]:
    if not memories:
        return [()] * len(problems)
    ranker = lab.dense(memories, lab.encoder)
    prompts = [problem.prompt for problem in problems]
    return ranked_memories(ranker, {memory.id: memory for memory in memories}, prompts, SHOTS)


async def grow(
    lab: Lab, agents: Sequence[Agent], domain: Domain, scorer: Scorer | None = None
) -> Grown:
    """``domain``'s seed memories, and what its problems add by ``scorer`` (the configured one).

    Retrieval is by the encoder as it comes. Raises `LLMUnavailable`; what was answered is kept.
    """
    scorer = scorer or lab.scorer()
    _, threshold = pool_settings(lab, domain.name)
    problems = domain.problems[: lab.config.evaluation.problems]
    grown = Grown(as_memories(domain.name, domain.pool))
    for start in range(0, len(problems), BATCH):
        batch = problems[start : start + BATCH]
        answers = await answered(lab, agents, batch, grown.memories)
        tried = await graded(lab, scorer, domain.name, answers)
        for item in tried:
            reason = _end(item, threshold)
            grown.ends[reason] += 1
            if reason == ends.STORED:
                grown.stored.append(item)
        grown.attempts += tried
        pairs = [*domain.pool, *(item.pair for item in grown.stored)]
        grown.memories = as_memories(domain.name, pairs)
    return grown


def _end(item: Attempt, threshold: float) -> str:
    if item.unusable:
        return item.unusable
    if item.grade.value is None:
        return ends.REFUSED if item.grade.reason == ends.REFUSED else ends.UNREADABLE_GRADE
    return ends.STORED if item.grade.value >= threshold else ends.BELOW_THRESHOLD
