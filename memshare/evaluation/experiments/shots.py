"""Zero to three shots on every dataset: do memories help, and is it retrieval that helps?"""

from __future__ import annotations

from collections.abc import AsyncIterator

from memshare.evaluation.decontaminate import leak_report
from memshare.evaluation.experiment import Experiment, View
from memshare.evaluation.grow import grow
from memshare.evaluation.lab import Lab
from memshare.evaluation.material import as_memories
from memshare.evaluation.measures import CHRF, F1, QUALITY
from memshare.evaluation.rows import DECONTAMINATED, PUBLISHED, WORLD, Key, Row, count_row

COUNTS = (1, 2, 3)
COMPARED_BY = "word 3-grams"
LEAKS = ("unique_tests", "exact_questions", "exact_answers", "near_questions")


async def rows(lab: Lab) -> AsyncIterator[Row]:
    """Every dataset, decontaminated and as published, by every model (the whole `Lab.team`).

    ``retrieved`` and ``random``: pools of seed memories and problems with their reference answers;
    ``own answers`` and ``own answers, random``: seed memories and what the agents, in turn,
    answered to the problems themselves and the scorer accepted. ``none``: no memory shown. One
    encoder finds for all arms, trained on the pools with reference answers (never on a test).
    """
    limit, everyone = lab.config.evaluation.questions, tuple(lab.team)
    clean = lab.asked(limit)
    published = {name: lab.published[name] for name in clean if name != WORLD}
    few = {name: lab.few(domain, limit) for name, domain in published.items()}
    for split, domains in ((DECONTAMINATED, clean), (PUBLISHED, few)):
        pools = {name: as_memories(name, domain.pairs) for name, domain in domains.items()}
        encoder = (await lab.learn(pools)).encoder
        for name, domain in domains.items():
            filled = {"": pools[name]}
            if split == DECONTAMINATED:
                grown = await grow(lab, list(lab.team.values()), domain)
                filled["own answers"] = grown.memories
                ends = {"problems": len(grown.attempts), **grown.ends}
                for what, count in ends.items():
                    key = Key("own answers", "", name, f"count: {what}", _all(lab), split)
                    yield count_row(key, count, len(grown.attempts), lab.seed)
            for row in await lab.answers(
                {"none": None}, domain, [], at="0", split=split, agents=everyone
            ):
                yield row
            for content, memories in filled.items():
                arms = {
                    content or "retrieved": lab.dense(memories, encoder),
                    f"{content}, random" if content else "random": lab.random(memories),
                }
                for count in COUNTS if not content else COUNTS[-1:]:
                    for row in await lab.answers(
                        arms, domain, memories, shots=count, at=str(count), split=split,
                        agents=everyone,
                    ):  # fmt: skip
                        yield row
    for domain in published.values():
        for leaks in leak_report(domain):
            for what in LEAKS:
                key = Key("leaks", "", leaks.dataset, f"count: {what}", COMPARED_BY, PUBLISHED)
                yield count_row(key, getattr(leaks, what), leaks.tests, lab.seed)


def _all(lab: Lab) -> str:
    return ", ".join(lab.team)


EXPERIMENT = Experiment(
    "shots",
    "Do one to three memories of the pool help an agent to answer, and do retrieved ones help more "
    "than random ones, which any examples would?",
    rows,
    contrasts=(
        ("retrieved", "none@0"), ("retrieved", "random"), ("own answers", "none@0"),
        ("own answers", "own answers, random"), ("own answers", "retrieved"),
    ),
    shown=QUALITY,
    tested=(F1, CHRF),
    views=(
        View("Answer quality by number of shots", "lines", "memories shown"),
        View(
            "Three shots, dataset by dataset", "bars", "dataset",
            arms=("none@0", "random@3", "retrieved@3", "own answers@3"),
        ),
    ),
)  # fmt: skip
