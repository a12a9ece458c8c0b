"""Is sharing itself worth anything? The paper assumed it."""

from __future__ import annotations

from collections.abc import AsyncIterator

from memshare.evaluation.data import Domain
from memshare.evaluation.experiment import Experiment, View
from memshare.evaluation.grow import grow
from memshare.evaluation.lab import Lab, as_memories
from memshare.evaluation.rankers import Ranker
from memshare.evaluation.rows import WORLD, Row
from memshare.records import Memory

AGENTS = (1, 2, 4, 8)


async def rows(lab: Lab) -> AsyncIterator[Row]:
    """Three shots, found by the encoder as it comes.

    ``own`` and ``shared`` at 1 to 8 agents: memories and test questions are dealt to the agents in
    turn; each question is answered from its agent's memories alone, or from everyone's.
    ``homogeneous`` and ``diverse`` (the data's domains only): equally many memories, from the
    question's own domain or in equal parts from all domains. With several agent models:
    ``own model`` and ``all models``, pools that one model or all of them in turn have answered.
    """
    domains = lab.sampled()
    for name, domain in domains.items():
        memories = as_memories(name, domain.pairs)
        everyone = lab.dense(memories, lab.encoder)
        for count in AGENTS:
            parts = [memories[agent::count] for agent in range(count)]
            own = dealt(domain, [lab.dense(part or memories[:1], lab.encoder) for part in parts])
            arms = {"own": own, "shared": everyone}
            for row in await lab.answers(arms, domain, memories, at=str(count)):
                yield row
    async for row in diversity(lab, {n: d for n, d in domains.items() if n != WORLD}):
        yield row
    if len(lab.agents) > 1:
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
            ranker = lab.dense(memories, lab.encoder)
            for row in await lab.answers({arm: ranker}, domain, memories):
                yield row


async def models(lab: Lab, domains: dict[str, Domain]) -> AsyncIterator[Row]:
    """Pools that hold the agents' own answers, of one model or of all in turn."""
    for domain in domains.values():
        everyone = (await grow(lab, list(lab.agents.values()), domain)).memories
        for model, agent in lab.agents.items():
            alone = (await grow(lab, [agent], domain)).memories
            pools: dict[str, list[Memory]] = {"own model": alone, "all models": everyone}
            for arm, memories in pools.items():
                ranker = lab.dense(memories, lab.encoder)
                for row in await lab.answers({arm: ranker}, domain, memories, agents=[model]):
                    yield row


EXPERIMENT = Experiment(
    "sharing",
    "Do agents answer better from everyone's memories than from their own, from how many agents "
    "on, and does diversity of memories help or their number?",
    rows,
    contrasts=(("shared", "own"), ("homogeneous", "diverse"), ("all models", "own model")),
    views=(
        View("Own memories against shared ones", "lines", "agents that share"),
        View("Equally many memories of one domain or of all", "bars", "dataset"),
    ),
)
