"""What should say which candidates help: likelihood, the paper's asked probability, or reward?"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

from memshare.evaluation.experiment import Experiment, View
from memshare.evaluation.experiments.retriever import RANDOM, found
from memshare.evaluation.lab import Lab
from memshare.evaluation.material import as_memories
from memshare.evaluation.measures import CHRF, F1
from memshare.evaluation.rows import WORLD, Row
from memshare.metrics.ir import METRICS

Sections = Mapping[str, Mapping[str, Any]]
SETTINGS: dict[str, Sections] = {
    "likelihood": {"mining": {"labels": "likelihood"}},
    "prompted": {"mining": {"labels": "prompted"}},
    "reward": {"mining": {"labels": "reward"}},
    "own memory": {"mining": {"labels": "none"}},
    "2 candidates": {"mining": {"candidates": 1, "dense_candidates": 1}},
    "16 candidates": {"mining": {"candidates": 8, "dense_candidates": 8}},
    "1 positive": {"training": {"positives": 1, "positives_per_step": None}},
    "3 positives": {"training": {"positives": 3, "positives_per_step": 1}},
    "no hard negative": {"training": {"hard_negatives": 0}},
    "3 hard negatives": {"training": {"hard_negatives": 3}},
}


async def rows(lab: Lab) -> AsyncIterator[Row]:
    """Three shots, and what is found, by an encoder trained with each sort of label.

    The other settings are the configuration's, and the labels likelihoods where an arm says nothing
    else. On the pocket world, if it is there, since it is known there which memories are relevant;
    else on the first domain. The pool is cut to ``evaluation.labelled`` memories: a reward costs an
    answer for each candidate.
    """
    domains = lab.sampled()
    domain = domains.get(WORLD, next(iter(domains.values())))
    memories = as_memories(domain.name, domain.pairs)[: lab.config.evaluation.labelled]
    rankers = {"frozen": lab.dense(memories, lab.encoder), "random": lab.random(memories)}
    for arm, sections in SETTINGS.items():
        mining = {"labels": "likelihood", **sections.get("mining", {})}
        learned = await lab.learn(
            {domain.name: memories}, mining=mining, training=sections.get("training", {})
        )
        rankers[arm] = lab.dense(memories, learned.encoder)
    for row in await lab.answers(rankers, domain, memories):
        yield row
    if domain.keys:
        for row in found(lab, domain, memories, rankers, by={"random": RANDOM}):
            yield row


EXPERIMENT = Experiment(
    "labels",
    "Which labels, how many candidates, positives and hard negatives teach the retriever most?",
    rows,
    contrasts=(
        *((arm, "frozen") for arm in ("likelihood", "prompted", "reward", "own memory")),
        *((arm, "likelihood") for arm in SETTINGS if arm != "likelihood"),
    ),
    shown=(F1, CHRF, *METRICS),
    tested=(F1, CHRF, "MRR@10"),
    views=(
        View("Finding relevant memories", "rows", "", "MRR@10", "MRR@10"),
        View("Three shots after training on each label", "rows", ""),
    ),
)
