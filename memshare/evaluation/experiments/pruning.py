"""A pool with a cap: which memories may go, and what is lost with them?"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Container, Sequence
from dataclasses import replace

from memshare.evaluation.data import Domain
from memshare.evaluation.experiment import Experiment, View
from memshare.evaluation.experiments.retriever import found
from memshare.evaluation.grow import BATCH, SHOTS, answered, grade, pool_settings
from memshare.evaluation.lab import Lab
from memshare.evaluation.material import as_memories
from memshare.evaluation.measures import CHRF, F1
from memshare.evaluation.rows import WORLD, Key, Row, count_row
from memshare.evaluation.stream import Gain, Stream, survivors
from memshare.llm.base import ContextTooLong
from memshare.llm.likelihood import Likelihood
from memshare.metrics.ir import METRICS
from memshare.pruning.policies import POLICIES, Policy
from memshare.records import Memory, normalise

CAPS = (0.25, 0.5, 0.75)
EVERYTHING, RANDOM = "nothing pruned", "random"
FEEDBACK, USEFULNESS = "feedback", "usefulness"
LEFT, RIGHT = "count: memories left", "count: right answers left"


async def rows(lab: Lab) -> AsyncIterator[Row]:
    """Three shots from what each policy leaves of a stream in a pool that holds a part of it; for
    the pocket world also what is found.

    The stream: a domain's seed memories, then its problems (of the pocket world
    ``evaluation.stream`` of them). Every other problem comes with its reference answer, as from
    someone who knows; the others with what an agent answered from the seed memories, right or
    wrong. All are graded by the configured scorer, and none is turned away: what is bad is left to
    pruning. Each question on its arrival finds three memories, by the encoder trained on the pools
    with reference answers: that is their ``use``; what they add to the likelihood of the answer
    that arrives is their ``usefulness``. ``feedback``: the asker is for a memory of his question's
    group with a right answer, against any other; only the pocket world knows groups, so elsewhere
    that policy is left out. ``random``: whoever is unlucky whenever the cap is exceeded. ``nothing
    pruned, random``: random shots, from all of it.

    A memory is relevant if it is of the question's group and its answer is right, left or not:
    whoever keeps little must not be measured by that little.
    """
    domains = lab.sampled()
    reference = {name: as_memories(name, domain.pairs) for name, domain in domains.items()}
    encoder = (await lab.learn(reference)).encoder
    if lab.stream is not None:
        domains[WORLD] = lab.stream
    names = ", ".join(lab.agents)
    for name, domain in domains.items():
        seeds, memories = await arrivals(lab, domain)
        right = rightly_answered(domain, memories)
        relevant = [memory for memory in memories if memory.id in right]
        stream = Stream(
            memories,
            encoder.encode_queries([memory.prompt for memory in memories]),
            encoder.encode_memories([(memory.prompt, memory.answer) for memory in memories]),
            votes(domain, right) if domain.keys else None,
        )
        pools = {(EVERYTHING, "100%"): memories, **await pruned(lab, name, stream, seeds)}
        for (arm, at), left in pools.items():
            key = Key(arm, at, name, LEFT, names, "decontaminated")
            yield count_row(key, len(left), len(memories), lab.seed)
            good = sum(memory.id in right for memory in left)
            yield count_row(key._replace(metric=RIGHT), good, len(left), lab.seed)
            ranker = lab.dense(left, encoder)
            for row in await lab.answers({arm: ranker}, domain, left, at=at):
                yield row
            if domain.keys:
                for row in found(lab, domain, relevant, {arm: ranker}, at):
                    yield row
        # Elsewhere the control is what pruning at random leaves. Last, as it is in no other plot.
        control = {f"{EVERYTHING}, random": lab.random(memories)}
        for row in await lab.answers(control, domain, memories, at="100%"):
            yield row


async def arrivals(lab: Lab, domain: Domain) -> tuple[int, list[Memory]]:
    """The stream's graded memories; the first so many are the seed memories."""
    scorer, agents = lab.scorer(), list(lab.agents.values())
    seeds = as_memories(domain.name, domain.pool)
    answers = await answered(lab, agents, domain.problems[1::2], seeds)
    own = {item.problem: item.pair for item in answers}
    pairs = [*domain.pool, *(own.get(problem, problem) for problem in domain.problems)]
    memories = as_memories(domain.name, pairs)
    rubric, _ = pool_settings(lab, domain.name)
    grades = await asyncio.gather(*(grade(scorer, m.prompt, m.answer, rubric) for m in memories))
    return len(seeds), [
        replace(memory, score=given.value) for memory, given in zip(memories, grades, strict=True)
    ]


def rightly_answered(domain: Domain, memories: Sequence[Memory]) -> set[str]:
    """The ids of the memories whose answer is the known one."""
    known = {(normalise(pair.prompt), normalise(pair.answer)) for pair in domain.pairs}
    return {m.id for m in memories if (normalise(m.prompt), normalise(m.answer)) in known}


def votes(domain: Domain, right: Container[str]) -> Callable[[Memory, Memory], float]:
    """What the asker of the second memory's question thinks of the first."""
    groups = {normalise(prompt): group for prompt, group in domain.keys.items()}

    def vote(shown: Memory, asked: Memory) -> float:
        same = groups[normalise(shown.prompt)] == groups[normalise(asked.prompt)]
        return 1.0 if same and shown.id in right else -1.0

    return vote


def at_random(seed: int) -> Policy:
    """The control: whichever memories the seed draws."""
    draw = random.Random(seed)
    return lambda evidence: draw.sample([e.id for e in evidence.entries], len(evidence.entries))


def measured_gain(lab: Lab) -> Gain:
    """How much likelier the second memory's answer becomes when the first is shown."""
    likelihood = Likelihood(lab.scorer_llm, instruction=lab.config.agent.instruction)

    async def gain(shown: Memory, asked: Memory) -> float | None:
        pair = shown.prompt, shown.answer
        try:
            with_it = await likelihood.score(asked.prompt, asked.answer, [pair])
            return with_it - await likelihood.baseline(asked.prompt, asked.answer)
        except ContextTooLong:
            return None

    return gain


async def pruned(
    lab: Lab, pool: str, stream: Stream, seeds: int
) -> dict[tuple[str, str], list[Memory]]:
    """What each policy leaves at each cap, by policy and cap."""
    _, threshold = pool_settings(lab, pool)
    gain = measured_gain(lab)
    policies = {RANDOM: at_random(lab.seed), **POLICIES}
    voted = policies.pop(FEEDBACK)
    if stream.votes is not None:
        policies[FEEDBACK] = voted  # last, so that the others look alike where it is left out
    chosen = [(arm, share) for share in CAPS for arm in policies]
    left = await asyncio.gather(*(
        survivors(
            stream, seeds, max(1, round(share * len(stream.memories))), policies[arm], threshold,
            shots=SHOTS, batch=BATCH, gain=gain if arm == USEFULNESS else None,
        )
        for arm, share in chosen
    ))  # fmt: skip
    return {(arm, f"{share:.0%}"): found for (arm, share), found in zip(chosen, left, strict=True)}


EXPERIMENT = Experiment(
    "pruning",
    "When a pool may hold a part of what arrives, which memories should go, and what is lost?",
    rows,
    contrasts=(
        *((arm, f"{EVERYTHING}@100%") for arm in (RANDOM, *POLICIES)),
        *((arm, RANDOM) for arm in POLICIES),
        (EVERYTHING, f"{EVERYTHING}, random"),
    ),
    shown=(F1, CHRF, *METRICS),
    tested=(F1, CHRF, "MRR@10"),
    views=(
        View("Three shots from what is left", "lines", "share of the stream that the pool holds"),
        View("Finding right memories in what is left", "lines",
             "share of the stream that the pool holds", "MRR@10", "MRR@10", (WORLD,)),
    ),
)  # fmt: skip
