"""One pool for each domain, or one pool for all?"""

from __future__ import annotations

from collections.abc import AsyncIterator

from memshare.evaluation.data import SINGLE
from memshare.evaluation.experiment import Experiment, View
from memshare.evaluation.lab import Lab
from memshare.evaluation.material import as_memories
from memshare.evaluation.measures import CHRF, F1
from memshare.evaluation.rows import WORLD, Row


async def rows(lab: Lab) -> AsyncIterator[Row]:
    """Three shots for the same questions.

    ``domain``: from the pool of the question's own domain; ``all domains``: from those pools put
    together; ``mixed``: from the data's own mixed pool, if it has one (`single`), which is smaller.
    Each retriever is trained on the pools that it searches; ``random`` arms beside them.
    """
    domains = {
        name: lab.few(domain, lab.config.evaluation.questions)
        for name, domain in lab.own_pools.items()
        if name != WORLD
    }
    own = {name: as_memories(name, domain.pairs) for name, domain in domains.items()}
    every = as_memories("all", [pair for domain in domains.values() for pair in domain.pairs])
    settings = {
        "domain": (own, dict(own)),
        "all domains": ({"all": every}, dict.fromkeys(domains, every)),
    }
    if SINGLE in lab.domains and SINGLE not in domains:
        mixed = as_memories(SINGLE, lab.domains[SINGLE].pairs)
        settings["mixed"] = ({SINGLE: mixed}, dict.fromkeys(domains, mixed))
    for arm, (pools, memories) in settings.items():
        encoder = (await lab.learn(pools)).encoder
        for name, domain in domains.items():
            chosen = memories[name]
            arms = lab.beside_random(arm, chosen, encoder)
            for row in await lab.answers(arms, domain, chosen):
                yield row


EXPERIMENT = Experiment(
    "pools",
    "Does a pool for each domain answer better than a single one for all of them?",
    rows,
    contrasts=(
        ("domain", "all domains"), ("domain", "mixed"), ("domain", "domain, random"),
        ("all domains", "all domains, random"), ("mixed", "mixed, random"),
    ),
    tested=(F1, CHRF),
    views=(View("A pool for each domain against one for all", "rows", ""),),
)  # fmt: skip
