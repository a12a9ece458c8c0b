"""What an experiment works with: data, models, measures and a cache of everything asked.

The test questions of the data are answered from pools out of which everything that gives one of
them away was taken (`decontaminate`); the data as published stands beside it. The pocket world, if
the configuration wants it, is one domain more. A question never sees its own copy (`rankers`).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np

from memshare.config import Config, ConfigError, EncoderConfig, LLMConfig
from memshare.evaluation.arms import answer_all, ranked_memories, sampling_seed
from memshare.evaluation.cache import CachedLLM, ResultCache
from memshare.evaluation.data import Domain, Pair
from memshare.evaluation.decontaminate import decontaminate_all
from memshare.evaluation.learn import Learned, Pools, learn
from memshare.evaluation.material import load_data, long_world, world_domain
from memshare.evaluation.measures import Measures
from memshare.evaluation.rankers import Ranker, dense_ranker, random_ranker
from memshare.evaluation.rows import (
    DECONTAMINATED,
    WORLD,
    Key,
    Row,
    mean_row,
    question_keys,
)
from memshare.llm.agent import Agent
from memshare.llm.base import LLM
from memshare.llm.factory import make_llm
from memshare.llm.scorer import Scorer, make_scorer
from memshare.pocket.world import write_references
from memshare.records import Memory
from memshare.retrieval.encoder import Encoder

QUICK: dict[str, dict[str, Any]] = {
    "evaluation": {
        "memories": 8,
        "questions": 2,
        "sample": 1,
        "world": (8, 8, 3),
        "stream": 16,
        "problems": 2,
        "seeds": 4,
        "labelled": 8,
    },
    "training": {"max_steps": 2, "eval_every": None, "patience": None},
    "mining": {"candidates": 2, "dense_candidates": 1},
    "bootstrap": {"questions": 4, "rounds": 1},
    "agent": {"max_tokens": 24},
}
ScorerKind = Literal["rubric", "likelihood", "reference"]


def shrink(config: Config) -> Config:
    """The same configuration with a few of everything: for a look at all of it within minutes."""
    sections = {}
    for name, values in QUICK.items():
        section = getattr(config, name)
        if name == "evaluation" and section.world is None:
            values = {key: value for key, value in values.items() if key != "world"}
        sections[name] = section.model_copy(update=values)
    return config.model_copy(update=sections)


class Lab:
    """The parts, opened by `open_lab`."""

    def __init__(
        self, config: Config, out: Path, cache: ResultCache, llms: Mapping[str, LLM],
        partners: Mapping[str, LLM], scorer_llm: LLM,
    ) -> None:  # fmt: skip
        """``llms``, ``partners``: the agents' models by name; ``out``: where reports go.

        What is worth keeping from run to run (cache, encoders) goes to ``work``, the run folder.
        """
        self.seed = config.run.seed
        self.out, self.work = out, config.run.dir
        self.cache = cache
        self.uncached, self.uncached_scorer = llms, scorer_llm
        self.team = {
            name: Agent(CachedLLM(llm, cache), config.agent)
            for name, llm in {**llms, **partners}.items()
        }
        self.agents = {name: self.team[name] for name in llms}  # who answers everywhere
        self.scorer_llm = CachedLLM(scorer_llm, cache)
        self.measures = Measures(config.evaluation.bertscore_model, cache)
        self.published = load_data(config)
        self.domains = decontaminate_all(self.published)
        if config.evaluation.world is not None:
            self.domains[WORLD] = world_domain(self.seed, config.evaluation.world)
        self.stream = long_world(config)
        self.encoder_name = _label(config.encoder)
        self.scorer_name = _label(config.scorer_llm)
        # Every problem has a known answer: that is what a scorer of kind `reference` grades by.
        known = self.work / "references.jsonl"
        told = [*self.domains.values(), *([self.stream] if self.stream else [])]
        write_references(known, [pair for domain in told for pair in domain.pairs])
        references = {"references": (*config.scorer.references, known)}
        self.config = config.model_copy(
            update={"scorer": config.scorer.model_copy(update=references)}
        )
        self._encoder: Encoder | None = None
        self._fingerprints = WeakKeyDictionary[Encoder, str]()
        self._vectors: dict[tuple[str, str], np.ndarray] = {}

    @property
    def own_pools(self) -> dict[str, Domain]:
        """The domains that have tests of their own: all but a mixed pool, decontaminated."""
        seen: set[str] = set()
        found = {}
        for name, domain in sorted(self.domains.items(), key=lambda item: len(item[1].tests)):
            if not set(domain.tests) <= seen:
                found[name] = domain
                seen |= set(domain.tests)
        return found

    @property
    def encoder(self) -> Encoder:
        """The configured encoder, untrained."""
        if self._encoder is None:
            self._encoder = Encoder.load(self.config.encoder)
        return self._encoder

    def few(self, domain: Domain, most: int | None) -> Domain:
        """``domain`` with at most ``most`` questions a dataset, drawn by the seed."""
        if most is None:
            return domain
        tests = {
            name: tuple(random.Random(f"{self.seed}/{name}").sample(group, min(most, len(group))))
            for name, group in domain.tests.items()
        }
        return replace(domain, tests=tests)

    def sampled(self) -> dict[str, Domain]:
        """`own_pools` with ``evaluation.sample`` questions a dataset."""
        return self.asked(self.config.evaluation.sample)

    def asked(self, most: int | None) -> dict[str, Domain]:
        """`own_pools` with at most ``most`` questions a dataset.

        The pocket world keeps all of its own, whose number the configuration says already.
        """
        return {n: d if n == WORLD else self.few(d, most) for n, d in self.own_pools.items()}

    def started(self, domain: Domain) -> Domain:
        """``domain`` with ``evaluation.seeds`` seed memories, for agents to fill its pool."""
        return replace(domain, pool=domain.pool[: self.config.evaluation.seeds])

    async def learn(self, pools: Pools, iterations: int = 1, **sections: Any) -> Learned:
        """`learn` with the lab's configuration, ``sections`` of it changed: ``training={...}``."""
        changed = {
            name: getattr(self.config, name).model_copy(update=values)
            for name, values in sections.items()
        }
        config = self.config.model_copy(update=changed)
        return await learn(config, pools, self.work / "learned", iterations)

    def dense(self, memories: Sequence[Memory], encoder: Encoder) -> Ranker:
        """A ranker by ``encoder``, which encodes no memory twice."""
        name = self._fingerprints.get(encoder) or encoder.memory_fingerprint()
        self._fingerprints[encoder] = name  # the weights are hashed for it: once is enough
        missing = [m for m in memories if (name, m.id) not in self._vectors]
        made = encoder.encode_memories([(m.prompt, m.answer) for m in missing])
        self._vectors.update(((name, m.id), row) for m, row in zip(missing, made, strict=True))
        rows = [self._vectors[name, memory.id] for memory in memories]
        vectors = np.stack(rows) if rows else np.empty((0, encoder.dim), np.float32)
        return dense_ranker(memories, encoder, vectors)

    def scorer(self, kind: ScorerKind | None = None) -> Scorer:
        """The configured scorer, or one of another kind (a rubric is then graded by labels)."""
        settings = self.config.scorer
        if kind is not None and kind != settings.kind:
            settings = settings.model_copy(update={"kind": kind, "grading": "labels"})
        return make_scorer(settings, self.scorer_llm)

    async def answers(
        self,
        arms: Mapping[str, Ranker | None],
        domain: Domain,
        memories: Sequence[Memory],
        *,
        shots: int = 3,
        at: str = "",
        split: str = DECONTAMINATED,
        agents: Sequence[str] = (),
    ) -> list[Row]:
        """The rows of some arms: each test of ``domain`` answered with its ranker's best memories.

        ``agents``: which of the `team` answer (default: `agents`). A question that fails scores 0
        and counts in ``failed``. All is asked at once: the backends bound and batch what they do
        together.
        """
        by_id = {memory.id: memory for memory in memories}
        asked: list[tuple[Key, Sequence[Pair], Sequence[Sequence[Memory]]]] = []
        for arm, ranker in arms.items():
            for dataset, tests in domain.tests.items():
                best: Sequence[Sequence[Memory]] = [()] * len(tests)
                if ranker is not None:
                    best = ranked_memories(ranker, by_id, [test.prompt for test in tests], shots)
                asked += [
                    (Key(arm, at, dataset, "", name, split), tests, best)
                    for name in agents or self.agents
                ]
        seed = sampling_seed(self.config)
        answered = await asyncio.gather(
            *(answer_all(self.team[key.model], tests, best, seed) for key, tests, best in asked)
        )
        texts = [[answer.text if answer else "" for answer in answers] for answers in answered]
        scores = await self.measures.datasets(
            [(tests, row) for (_, tests, _), row in zip(asked, texts, strict=True)]
        )
        rows: list[Row] = []
        for (key, group, _), answers, scored in zip(asked, answered, scores, strict=True):
            names = question_keys(test.prompt for test in group)
            failed = answers.count(None)
            for metric in scored[0] if scored else ():
                questions = {n: row[metric] for n, row in zip(names, scored, strict=True)}
                rows.append(mean_row(key._replace(metric=metric), questions, self.seed, failed))
        return rows

    def random(self, memories: Sequence[Memory]) -> Ranker:
        """Random memories: the arm that tells retrieval from any examples at all."""
        return random_ranker(memories, self.seed)

    def beside_random(
        self, arm: str, memories: Sequence[Memory], encoder: Encoder | None = None
    ) -> dict[str, Ranker]:
        """``arm``, by ``encoder`` (default: the one that is configured), and ``arm, random``."""
        return {
            arm: self.dense(memories, encoder or self.encoder),
            f"{arm}, random": self.random(memories),
        }


@asynccontextmanager
async def open_lab(config: Config, out: Path) -> AsyncIterator[Lab]:
    """The lab of ``config``, its reports in ``out``; models and cache are closed at the end.

    Raises `LLMError`, `EncoderError` and FileNotFoundError, each saying what is missing, and
    `ConfigError` for a partner that is named as an agent.
    """
    agents = config.evaluation.agents or {_label(config.agent_llm): config.agent_llm}
    if both := sorted(agents.keys() & config.evaluation.partners.keys()):
        # In the rows a name is all that tells models apart.
        raise ConfigError(f"evaluation.partners: {', '.join(both)} is an agent's name already")
    async with AsyncExitStack() as stack:
        cache = stack.enter_context(closing(ResultCache(config.run.dir / "cache" / "results.db")))
        opened: dict[str, LLM] = {}

        async def llm(settings: LLMConfig) -> LLM:
            name = settings.model_dump_json()
            if name not in opened:  # equal settings share one model
                opened[name] = make_llm(settings)
                stack.push_async_callback(opened[name].aclose)
                await opened[name].ready()
            return opened[name]

        async def named(settings: Mapping[str, LLMConfig]) -> dict[str, LLM]:
            return {name: await llm(one) for name, one in settings.items()}

        llms, partners = await named(agents), await named(config.evaluation.partners)
        yield Lab(config, out, cache, llms, partners, await llm(config.scorer_llm))


def _label(config: LLMConfig | EncoderConfig) -> str:
    return config.model.rstrip("/").rsplit("/", 1)[-1]
