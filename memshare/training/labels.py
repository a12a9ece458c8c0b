"""What a candidate is worth for a training query: one labeller a kind of `mining.labels`.

``none``        nothing is measured; the query's own memory becomes the positive.
``given``       0 where query and candidate have the same label, -1 otherwise. The label is
                ``metadata[mining.given_key]``; where one of the two lacks it, equal answers count.
``likelihood``  mean log-likelihood per token (nats) of the query's answer with the candidate shown
                before the query; the baseline is the same with no example.
``prompted``    log of the probability that the scorer states when it is asked (the paper's way);
                there is no baseline, since the question is about the example.
``reward``      the scorer's grade, as a share of 100, of what the agent answers to the query with
                the candidate shown; the baseline is its grade with no memory at all.

All grow with usefulness. Only ``likelihood`` is in nats per token.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass, replace

from memshare.config import Config, ConfigError, LLMConfig, MiningConfig
from memshare.llm.agent import Agent
from memshare.llm.base import LLM, ContextTooLong, LLMError, LLMUnavailable
from memshare.llm.factory import make_llm
from memshare.llm.likelihood import Likelihood, LikelihoodCache
from memshare.llm.prompted import Prompted
from memshare.llm.rubric import load_rubric
from memshare.llm.scorer import make_scorer
from memshare.pool.store import PoolStore
from memshare.progress import log
from memshare.records import Memory, normalise

# (query, candidate or None for the baseline) -> worth, None where it can't be measured
Measure = Callable[[Memory, Memory | None], Awaitable[float | None]]


@dataclass(frozen=True, slots=True)
class Labeller:
    """``scorer`` names what measures; ``measure`` is None where nothing does (labels: none).

    ``calls()``: how many measurements reached an LLM and not only the cache.
    """

    scorer: str
    measure: Measure | None
    has_baseline: bool
    calls: Callable[[], int] = lambda: 0


def same_label(query: Memory, candidate: Memory, key: str) -> bool:
    """Whether two memories have the same given label, or, where one has none, the same answer."""
    if key in query.metadata and key in candidate.metadata:
        return _told(query, key) == _told(candidate, key)
    return normalise(query.answer) == normalise(candidate.answer)


def label_key(memory: Memory, mining: MiningConfig) -> str | None:
    """Key of its label where `mining.labels` are given; None where they are not, or it has none."""
    if mining.labels != "given" or mining.given_key not in memory.metadata:
        return None
    told = _told(memory, mining.given_key)
    return hashlib.sha256(f"label\x1f{told}".encode()).hexdigest()


def _told(memory: Memory, key: str) -> str:
    """Its label as JSON, in which ``true`` is not 1 as it is in Python."""
    return json.dumps(memory.metadata[key], sort_keys=True)


@dataclass(frozen=True, slots=True)
class Share:
    """Part ``index`` (0, 1, ...) ``of`` so many of a round, mined by a process of its own."""

    index: int
    of: int

    @property
    def name(self) -> str:
        """For its files and its lock."""
        return f"{self.index}-of-{self.of}"


def check_labels(config: Config) -> None:
    """Raise `ConfigError` where no training query could be labelled, whatever is in the pool.

    Here and not with the other settings, which a gateway reads that never mines.
    """
    if config.mining.labels == "likelihood" and config.scorer_llm.backend == "openai":
        raise ConfigError(
            "mining.labels: backend openai of scorer_llm gives no `likelihood`; set scorer_llm to "
            "a vLLM server or a model in this process, or mining.labels to reward or prompted"
        )


def open_cache(config: Config, share: Share | None = None) -> LikelihoodCache:
    """The run's likelihoods. A ``share`` only reads them: SQLite can't be shared by nodes.

    What it measures goes into a file of its own.
    """
    folder = config.run.dir / "cache"
    if share is None:
        return LikelihoodCache(folder / "likelihood.db")
    return LikelihoodCache(folder / "shares" / f"{share.name}.db", folder / "likelihood.db")


def merge_caches(config: Config) -> None:
    """Put what all shares measured into the run's likelihoods; none of them may still be mining."""
    shares = sorted((config.run.dir / "cache" / "shares").glob("*.db"))
    if shares:
        with closing(open_cache(config)) as cache:
            for path in shares:
                cache.absorb(path)
        for path in shares:
            path.unlink()


@asynccontextmanager
async def open_labeller(
    config: Config, store: PoolStore, share: Share | None = None
) -> AsyncIterator[Labeller]:
    """The labeller of ``config.mining.labels``; its LLMs are open while the block runs.

    A ``share`` of a round keeps what it measures in a cache file of its own.
    """
    async with AsyncExitStack() as stack:
        labels = config.mining.labels
        if labels == "none":
            yield Labeller("none", None, False)
        elif labels == "given":
            yield Labeller(f"given:{config.mining.given_key}", _given(config), False)
        elif labels == "reward":
            name, reward = await _reward(stack, config, store)
            measure, calls = _limited(reward, config.scorer_llm)
            yield Labeller(name, measure, True, calls)
        else:
            scorer = await _open(stack, config.scorer_llm)
            if labels == "likelihood":
                cache = stack.enter_context(closing(open_cache(config, share)))
                likelihood = Likelihood(scorer, cache, config.agent.instruction)
                measure, _ = _limited(_likelihood(likelihood), config.scorer_llm)
                yield Labeller(scorer.model, measure, True, lambda: likelihood.measured)
            else:
                measure, calls = _limited(_prompted(Prompted(scorer)), config.scorer_llm)
                yield Labeller(scorer.model, measure, False, calls)


async def _open(stack: AsyncExitStack, config: LLMConfig) -> LLM:
    llm = make_llm(config)
    stack.push_async_callback(llm.aclose)
    await llm.ready()
    return llm


def _limited(measure: Measure, config: LLMConfig) -> tuple[Measure, Callable[[], int]]:
    """At most as many measurements at once as the LLM takes, and how many there were.

    What doesn't fit the LLM's context, or is refused by it (by a content filter, say), is worth
    None, since a text in the pool must not stop mining for good. An LLM that is away, or refuses
    any text, is an error.
    """
    limit = asyncio.Semaphore(max(config.max_concurrency, config.batch_size))
    count, sound = 0, False

    async def limited(query: Memory, candidate: Memory | None) -> float | None:
        nonlocal count, sound
        async with limit:
            count += 1
            try:
                return await measure(query, candidate)
            except LLMUnavailable:
                raise
            except ContextTooLong:
                return None
            except LLMError as error:
                if not sound:  # then it is the LLM's trouble, and raises again
                    await measure(*_plain(query))
                    if not sound:  # others were refused meanwhile
                        log(f"{error}; what is refused is not measured")
                    sound = True
                return None

    return limited, lambda: count


def _plain(query: Memory) -> tuple[Memory, Memory]:
    """What no LLM refuses that measures anything, in the pool of ``query``."""
    return (
        replace(query, prompt="What is two plus two?", answer="Four."),
        replace(query, id="plain", prompt="What is one plus one?", answer="Two."),
    )


def _given(config: Config) -> Measure:
    async def given(query: Memory, candidate: Memory | None) -> float | None:
        assert candidate is not None
        return 0.0 if same_label(query, candidate, config.mining.given_key) else -1.0

    return given


def _likelihood(likelihood: Likelihood) -> Measure:
    async def measure(query: Memory, candidate: Memory | None) -> float | None:
        shots = [] if candidate is None else [(candidate.prompt, candidate.answer)]
        return await likelihood.score(query.prompt, query.answer, shots)

    return measure


def _prompted(prompted: Prompted) -> Measure:
    async def measure(query: Memory, candidate: Memory | None) -> float | None:
        assert candidate is not None
        shots = [(candidate.prompt, candidate.answer)]
        probability = await prompted.score(query.prompt, query.answer, shots)
        return math.log(max(probability, 1e-6))

    return measure


async def _reward(stack: AsyncExitStack, config: Config, store: PoolStore) -> tuple[str, Measure]:
    """What grades, by name, and its grades."""
    agent_llm = await _open(stack, config.agent_llm)
    scorer_llm: LLM | None = None
    if config.scorer.kind != "reference":  # which knows the answers, and asks no LLM
        same = config.agent_llm == config.scorer_llm
        scorer_llm = agent_llm if same else await _open(stack, config.scorer_llm)
    agent, scorer = Agent(agent_llm, config.agent), make_scorer(config.scorer, scorer_llm)
    rubrics = {name: load_rubric(store.pool(name).rubric) for name in config.served_pools}

    ungraded = False

    async def measure(query: Memory, candidate: Memory | None) -> float | None:
        nonlocal ungraded
        shown = [] if candidate is None else [candidate]
        # Without a memory an answer that can't be graded is one that nobody can use: worth nothing.
        # With one it measures nothing, since another draw might say more.
        unusable = 0.0 if candidate is None else None
        answer = await agent.answer(query.prompt, shown, seed=config.run.seed)
        if answer.cut_off or len(answer.used) < len(shown):
            return unusable  # cut off by length, or the candidate did not fit
        grade = await scorer.grade(query.prompt, answer.text, rubrics[query.pool])
        if grade.value is not None:
            return grade.value / 100
        if not ungraded:  # the first tells what may be wrong with all
            ungraded = True
            log(f"an answer can't be graded: {grade.reason}")
        return unusable

    return "reference" if scorer_llm is None else scorer_llm.model, measure
