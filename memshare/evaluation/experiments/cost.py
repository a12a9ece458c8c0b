"""What it costs: tokens, seconds and GPU seconds, by stage of the loop."""

from __future__ import annotations

import shutil
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from memshare.evaluation.arms import answer_all, ranked_memories, sampling_seed
from memshare.evaluation.cache import AroundLLM, CachedLLM, ResultCache
from memshare.evaluation.experiment import Experiment
from memshare.evaluation.grow import SHOTS, Answered, graded, pool_settings
from memshare.evaluation.lab import Lab
from memshare.evaluation.material import as_memories
from memshare.evaluation.report import machine
from memshare.evaluation.rows import Key, Row, count_row
from memshare.llm.agent import Agent
from memshare.llm.base import LLM, Chat, Completion, LogLikelihood, Message
from memshare.llm.scorer import make_scorer
from memshare.pool.store import PoolStore
from memshare.records import NewMemory

SECONDS, GPU_SECONDS, TOKENS = "seconds", "GPU seconds", "tokens"
ANSWERED, ACCEPTED, MEMORY = "per answered question", "per accepted memory", "per memory"
FIGURES = tuple(
    f"{what} {per}" for per in (ANSWERED, ACCEPTED, MEMORY)
    for what in (SECONDS, GPU_SECONDS, TOKENS)
)  # fmt: skip


class Metered(AroundLLM):
    """An LLM that notes what it reads and writes. It belongs under a cache: what the cache answers
    costs nothing.
    """

    def __init__(self, llm: LLM) -> None:
        super().__init__(llm)
        self._used = 0  # tokens that the LLM told
        self._contexts: list[Sequence[Message]] = []  # those that it did not

    async def chat(self, chat: Chat) -> Completion:
        """As the LLM's."""
        completion = await self.llm.chat(chat)
        self._used += tokens(completion)
        return completion

    async def loglikelihood(self, context: Sequence[Message], continuation: str) -> LogLikelihood:
        """As the LLM's."""
        found = await self.llm.loglikelihood(context, continuation)
        self._note(context, found.tokens)
        return found

    async def label_probabilities(
        self, context: Sequence[Message], labels: Sequence[str]
    ) -> list[float]:
        """As the LLM's, which writes one token."""
        found = await self.llm.label_probabilities(context, labels)
        self._note(context, 1)
        return found

    def tokens(self) -> int:
        """Tokens read and written. This tokenises every context: ask when no clock runs."""
        return self._used + sum(map(self.count_tokens, self._contexts))

    def _note(self, context: Sequence[Message], written: int) -> None:
        self._used += written
        self._contexts.append(context)


@dataclass(frozen=True)
class Stage:
    """What one stage took for a batch of questions; ``tokens``: None where no LLM has a part."""

    name: str
    seconds: float
    tokens: int | None = None


async def rows(lab: Lab) -> AsyncIterator[Row]:
    """The stages of a turn for ``evaluation.sample`` problems of each domain at once, measured anew
    in each run (nothing comes from the cache), and mining and training from the lab's first one.

    Seconds are wall time of the whole batch by its size; GPU seconds are that times the machine's
    GPUs, which are reserved whether they work or wait. Tokens: prompt and answer together, the
    agent's and the scorer's (0 for one that asks no LLM).
    """
    gpus = len(machine()["gpus"])
    for label in lab.agents:
        for name in lab.own_pools:
            stages, answered, accepted = await turn(lab, label, name)
            for stage in stages:
                for count, per in ((answered, ANSWERED), (accepted, ACCEPTED)):
                    if count:
                        for row in told(lab, stage, name, label, per, count, gpus):
                            yield row
    domains = lab.own_pools
    learned = await lab.learn({name: as_memories(name, d.pairs) for name, d in domains.items()})
    memories = sum(len(as_memories(name, domain.pairs)) for name, domain in domains.items())
    for step, model in (("mine", lab.scorer_name), ("train", lab.encoder_name)):
        stage = Stage(step, learned.report[step]["seconds"])
        for row in told(lab, stage, "all pools", model, MEMORY, memories, gpus):
            yield row


def told(
    lab: Lab, stage: Stage, dataset: str, model: str, per: str, count: int, gpus: int
) -> list[Row]:
    """A stage's cost for each of ``count`` things, as rows."""
    figures = {SECONDS: stage.seconds, GPU_SECONDS: stage.seconds * gpus}
    if stage.tokens is not None:
        figures[TOKENS] = stage.tokens
    return [
        count_row(
            Key(stage.name, "", dataset, f"{what} {per}", model, "decontaminated"),
            value / count, count, lab.seed,
        )
        for what, value in figures.items()
    ]  # fmt: skip


async def turn(lab: Lab, label: str, name: str) -> tuple[list[Stage], int, int]:
    """One turn of the loop for a batch of problems; also how many were answered and accepted."""
    domain = lab.own_pools[name]
    agent = Agent(lab.uncached[label], lab.config.agent)
    seeds = as_memories(name, domain.pool)
    problems = domain.problems[: lab.config.evaluation.sample]
    ranker = lab.dense(seeds, lab.encoder)
    _, threshold = pool_settings(lab, name)
    stages: list[Stage] = []

    began = time.perf_counter()
    by_id = {memory.id: memory for memory in seeds}
    shots = ranked_memories(ranker, by_id, [problem.prompt for problem in problems], SHOTS)
    stages.append(Stage("retrieve", time.perf_counter() - began))

    began = time.perf_counter()
    completions = await answer_all(agent, problems, shots, sampling_seed(lab.config))
    there = [completion for completion in completions if completion is not None]
    stages.append(Stage("answer", time.perf_counter() - began, sum(map(tokens, there))))

    metered = Metered(lab.uncached_scorer)
    with closing(ResultCache()) as cache:
        scorer = make_scorer(lab.config.scorer, CachedLLM(metered, cache))
        answers = [Answered(p, 0, c) for p, c in zip(problems, completions, strict=True)]
        began = time.perf_counter()
        tried = await graded(lab, scorer, name, answers)
        seconds = time.perf_counter() - began
    stages.append(Stage("grade", seconds, metered.tokens()))

    kept = [
        NewMemory(name, *item.pair, score=item.grade.value)
        for item in tried
        if item.grade.value is not None and item.grade.value >= threshold
    ]
    home = lab.work / "cost"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    limit = lab.config.gateway.max_text_chars
    with PoolStore.open(f"sqlite:///{home / 'pool.db'}", limit) as store:
        store.create_pool(name, "general", threshold)
        began = time.perf_counter()
        store.append(kept)
        stages.append(Stage("store", time.perf_counter() - began))
    return stages, len(there), len(kept)


def tokens(completion: Completion) -> int:
    """Of prompt and answer."""
    return completion.prompt_tokens + completion.completion_tokens


EXPERIMENT = Experiment(
    "cost",
    "What does an answered question, and what an accepted memory, cost at each stage of the loop?",
    rows,
    shown=FIGURES,
    tested=(),
)
