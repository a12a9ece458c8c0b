"""The pool grows: does quality, and does the retriever have to learn again as it does?"""

from __future__ import annotations

from collections.abc import AsyncIterator

from memshare.evaluation.experiment import Experiment, View
from memshare.evaluation.lab import Lab
from memshare.evaluation.material import as_memories
from memshare.evaluation.rows import Row

SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)


async def rows(lab: Lab) -> AsyncIterator[Row]:
    """Three shots from the first part of every pool, in its order of arrival.

    ``frozen``: found by the encoder as it came; ``retrained``: by one trained on just that part;
    ``random``: drawn from it.
    """
    domains = lab.sampled()
    whole = {name: as_memories(name, domain.pairs) for name, domain in domains.items()}
    for share in SHARES:
        pools = {name: m[: max(1, round(share * len(m)))] for name, m in whole.items()}
        encoder = (await lab.learn(pools)).encoder
        for name, domain in domains.items():
            arms = {
                "random": lab.random(pools[name]),
                "frozen": lab.dense(pools[name], lab.encoder),
                "retrained": lab.dense(pools[name], encoder),
            }
            for row in await lab.answers(arms, domain, pools[name], at=f"{share:.0%}"):
                yield row


EXPERIMENT = Experiment(
    "growth",
    "Does answer quality grow with the pool, and is it worth training the retriever again?",
    rows,
    contrasts=(("retrained", "frozen"), ("frozen", "random"), ("retrained", "retrained@20%")),
    views=(View("Answer quality as the pool grows", "lines", "share of the pool"),),
)
