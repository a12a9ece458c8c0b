"""Is sharing itself worth anything? The paper assumed it."""

from __future__ import annotations

from collections.abc import AsyncIterator

from memshare.evaluation.data import Domain
from memshare.evaluation.experiment import Experiment, View
from memshare.evaluation.grow import grow
from memshare.evaluation.lab import Lab
from memshare.evaluation.material import as_memories
from memshare.evaluation.rankers import Ranker
from memshare.evaluation.rows import DECONTAMINATED, WORLD, Key, Row, count_row

AGENTS = (1, 2, 4, 8)
OWN_MEMORIES, OWN_MODEL, ALL_MODELS = "own memories", "own model", "all models"


async def rows(lab: Lab) -> AsyncIterator[Row]:
    """Three shots, found by the encoder as it comes; ``random`` from the whole pool beside them.

    ``own`` and ``shared`` at 1 to 8 agents: memories and test questions are dealt to the agents in
    turn; each question is answered from its agent's memories alone, or from everyone's.
    ``homogeneous`` and ``diverse`` (the data's domains only): equally many memories, from the
    question's own domain or in equal parts from all domains.

    With several agent models (``evaluation.agents`` and ``partners``), each of them answers from
    pools of ``evaluation.seeds`` seed memories and what agents made of the problems. ``all
    models``: the models took turns; ``own memories``: of that pool the seeds and what this very
    model wrote; ``own model``: this model answered all the problems alone, as many as they
    together.
    """
    domains = lab.sampled()
    for name, domain in domains.items():
        memories = as_memories(name, domain.pairs)
        everyone = lab.dense(memories, lab.encoder)
        for count in AGENTS:
            parts = [memories[agent::count] for agent in range(count)]
            own = dealt(domain, [lab.dense(part or memories[:1], lab.encoder) for part in parts])
            arms = {"own": own, "shared": everyone, "random": lab.random(memories)}
            for row in await lab.answers(arms, domain, memories, at=str(count)):
                yield row
    async for row in diversity(lab, {n: d for n, d in domains.items() if n != WORLD}):
        yield row
    if len(lab.team) > 1:
        async for row in models(lab, domains):
            yield row


def dealt(domain: Domain, rankers: list[Ranker]) -> Ranker:
    """Each of a dataset's questions, in turn, through another agent's ranker."""
    turn = {
        test.prompt: number % len(rankers)
        for tests in domain.tests.values()
        for number, test in enumerate(tests)
    }
    return lambda questions, k: [rankers[turn[one]]([one], k)[0] for one in questions]


async def diversity(lab: Lab, domains: dict[str, Domain]) -> AsyncIterator[Row]:
    """Pools of equal size, from one domain or from all."""
    if len(domains) < 2:
        return
    pools = {name: as_memories(name, domain.pairs) for name, domain in domains.items()}
    size = min(map(len, pools.values()))
    mixed = [memory for pool in pools.values() for memory in pool[: size // len(pools)]]
    for name, domain in domains.items():
        same = pools[name][: len(mixed)]
        for arm, memories in (("homogeneous", same), ("diverse", mixed)):
            for row in await lab.answers(lab.beside_random(arm, memories), domain, memories):
                yield row


async def models(lab: Lab, domains: dict[str, Domain]) -> AsyncIterator[Row]:
    """Pools that agents of one model or of several filled, asked by each of the models."""
    for name, asked in domains.items():
        domain = lab.started(asked)
        together = await grow(lab, list(lab.team.values()), domain)
        for number, (model, agent) in enumerate(lab.team.items()):
            written = [item.pair for item in together.stored if item.agent == number]
            pools = {
                OWN_MEMORIES: as_memories(name, [*domain.pool, *written]),
                OWN_MODEL: (await grow(lab, [agent], domain)).memories,
                ALL_MODELS: together.memories,
            }
            for arm, memories in pools.items():
                key = Key(arm, "", name, "count: memories", model, DECONTAMINATED)
                yield count_row(key, len(memories), len(together.attempts), lab.seed)
                arms: dict[str, Ranker] = {arm: lab.dense(memories, lab.encoder)}
                if arm == ALL_MODELS:
                    arms[f"{arm}, random"] = lab.random(memories)
                for row in await lab.answers(arms, domain, memories, agents=[model]):
                    yield row


EXPERIMENT = Experiment(
    "sharing",
    "Do agents answer better from everyone's memories than from their own, from how many agents "
    "on, of different models too, and does diversity of memories help or their number?",
    rows,
    contrasts=(
        ("shared", "own"), ("shared", "random"), ("homogeneous", "diverse"),
        (ALL_MODELS, OWN_MEMORIES), (ALL_MODELS, OWN_MODEL), (ALL_MODELS, f"{ALL_MODELS}, random"),
    ),
    views=(
        View("Own memories against shared ones", "lines", "agents that share"),
        View("Equally many memories of one domain or of all", "bars", "dataset",
             arms=("homogeneous", "diverse")),
        View("Pools that agents of one model or of several filled", "rows", "",
             arms=(OWN_MEMORIES, OWN_MODEL, ALL_MODELS)),
    ),
)  # fmt: skip
