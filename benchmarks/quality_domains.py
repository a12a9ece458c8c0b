"""The domains of the paper's data for benchmarks/train_quality.py: pools, questions, judgements."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from pipeline import Work
from quality_trainers import TRAINED, train_all

from memshare.config import TrainingConfig
from memshare.evaluation.data import Domain, Pair, by_characters, load_nine
from memshare.evaluation.decontaminate import decontaminate
from memshare.evaluation.rankers import Ranker, bm25_ranker, dense_ranker, random_ranker
from memshare.pool.store import PoolStore
from memshare.records import Example, Memory
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.gate import PerQuery, judge
from memshare.training.relevance import HeldOutRelevance
from memshare.training.select import Selected, select
from memshare.training.split import grams, jaccard

FLOORS = ("random", "bm25", "frozen")
FOLDS = 5
HELD_OUT = "_held_out"
DOMAINS = ("literary", "literary_readable", "logic", "plan")
Ranks = list[list[str]]  # of every question, best first
Metrics = dict[str, PerQuery]  # retriever -> question number -> metric


class Part(NamedTuple):
    """Questions, and what the encoders that answer them are trained on."""

    questions: Sequence[Memory]
    items: Sequence[Selected]


def usable(
    examples: Sequence[Example], training: TrainingConfig, without: Collection[str] = ()
) -> list[Selected]:
    """The training queries that both trainers can use; memories ``without`` take no part at all."""
    kept = (
        replace(example, candidates=tuple(c for c in example.candidates if c.id not in without))
        for example in examples
        if example.query_id not in without
    )
    return [item for item in select(kept, training).items if item.negatives]


def domain_of(name: str) -> Domain:
    """The decontaminated domain that a data set's name stands for."""
    domain = decontaminate(load_nine()[name.removesuffix(HELD_OUT).removesuffix("_readable")])
    return readable(domain) if "_readable" in name else domain


def readable(domain: Domain) -> Domain:
    """A domain without what is in Chinese, which this encoder can't read."""

    def kept(pairs: Sequence[Pair]) -> tuple[Pair, ...]:
        return tuple(pair for pair in pairs if not by_characters((pair,)))

    tests = {name: group for name, group in domain.tests.items() if not by_characters(group)}
    return Domain(domain.name, kept(domain.pool), kept(domain.problems), tests)


def few(domain: Domain) -> Domain:
    """A small part of a domain, for ``--quick``."""
    tests = {name: group[:4] for name, group in domain.tests.items()}
    return Domain(domain.name, domain.pool[:30], domain.problems[:6], tests)


def folds(memories: Sequence[Memory], count: int, seed: int, least: float) -> list[list[Memory]]:
    """``memories`` in ``count`` parts of about the same size, near-duplicates in the same one.

    ``least``: from that similarity of their prompts on they are (``split.near_duplicate``).
    """
    sets = {memory.id: grams(memory.prompt) for memory in memories}
    clusters: list[list[Memory]] = []
    for memory in memories:
        near = (
            cluster
            for cluster in clusters
            if any(jaccard(sets[memory.id], sets[other.id]) >= least for other in cluster)
        )
        cluster = next(near, None)
        if cluster is None:
            clusters.append([memory])
        else:
            cluster.append(memory)
    random.Random(seed).shuffle(clusters)
    return [list(chain.from_iterable(clusters[start::count])) for start in range(count)]


def reference_questions(domain: Domain, pool: str) -> list[Memory]:
    """The domain's test questions with their reference answers, as memories that stand nowhere."""
    tests = [test for group in domain.tests.values() if not by_characters(group) for test in group]
    return [
        Memory(f"test {i}", pool, test.prompt, test.answer, None, None, None, "", {}, 0)
        for i, test in enumerate(tests)
    ]


def floors(memories: Sequence[Memory], work: Work, seed: int) -> dict[str, Ranker]:
    """The retrievers that learn nothing."""
    return {
        "random": random_ranker(memories, seed),
        "bm25": bm25_ranker(memories, work.config.bm25),
        "frozen": dense_ranker(memories, Encoder.load(work.config.encoder)),
    }


def measure_domain(
    folder: Path, name: str, domain: Domain, seeds: Sequence[int], settings: Mapping[str, Any]
) -> tuple[list[Metrics], dict[str, Any]]:
    """All seeds on one domain's pool: each retriever's metrics by question, on one judgement."""
    work = Work(folder / name, {**settings, "pools": {domain.name: {}}})
    memories = work.fill({domain.name: domain.pairs})[domain.name]
    examples, training = work.mine(), work.config.training
    if name.endswith(HELD_OUT):
        parts = [
            Part(fold, usable(examples, training, {memory.id for memory in fold}))
            for fold in folds(memories, FOLDS, seeds[0], work.config.split.near_duplicate)
        ]
    else:
        parts = [Part(reference_questions(domain, domain.name), usable(examples, training))]
    questions = [question for part in parts for question in part.questions]
    prompts = [question.prompt for question in questions]
    ranks: dict[str, Ranks] = {
        name: ranker(prompts, 10) for name, ranker in floors(memories, work, seeds[0]).items()
    }
    seconds = []
    for seed in seeds:
        for trainer in TRAINED:
            ranks[f"{trainer} {seed}"] = []
        for number, part in enumerate(parts):
            home = work.folder / f"seed-{seed}-{number}"
            encoders, took = train_all(work.config, part.items, seed, home)
            seconds.append(took)
            for trainer, encoder in encoders.items():
                found = dense_ranker(memories, encoder)([q.prompt for q in part.questions], 10)
                ranks[f"{trainer} {seed}"] += found
    gains = asyncio.run(judge_all(work, memories, questions, list(ranks.values())))
    ranks["oracle"] = [sorted(row, key=lambda id_: -row[id_])[:10] for row in gains]
    runs = {name: {str(i): row for i, row in enumerate(rows)} for name, rows in ranks.items()}
    judged = judge(runs, {str(i): row for i, row in enumerate(gains)}, work.config.relevant_above)
    rows: list[Metrics] = [
        {name: judged[f"{name} {seed}" if name in TRAINED else name]
         for name in (*FLOORS, *TRAINED, "oracle")}
        for seed in seeds
    ]  # fmt: skip
    told = {"memories": len(memories), "training_queries": [len(part.items) for part in parts],
            "questions": len(questions),
            "unknown_tokens": unknown_tokens(work, parts[0].items),
            "without_relevant": len(questions) - len(rows[0]["oracle"]),
            "judged": sum(map(len, gains)),
            "relevant_share": fmean(gain > work.config.relevant_above for row in gains
                                    for gain in row.values()),
            "seconds": seconds}  # fmt: skip
    return rows, told


def unknown_tokens(work: Work, items: Sequence[Selected]) -> float:
    """The share of the training queries' tokens that the encoder does not know."""
    encoder = Encoder.load(work.config.encoder)
    rows = encoder.tokenize_to_ids([item.query for item in items])
    return sum(row.count(encoder.tokenizer.unk_token_id) for row in rows) / sum(map(len, rows))


async def judge_all(
    work: Work, memories: Sequence[Memory], questions: Sequence[Memory], ranks: Sequence[Ranks]
) -> list[dict[str, float]]:
    """Of each question, the gain of every memory that any retriever found."""
    by_id = {memory.id: memory for memory in memories}
    found = [
        list(dict.fromkeys(i for row in rows for i in row)) for rows in zip(*ranks, strict=True)
    ]
    with PoolStore.open(work.config.url) as store:
        relevance = HeldOutRelevance(work.config, store)
        gains = await asyncio.gather(
            *(
                relevance(question, [by_id[i] for i in ids])
                for question, ids in zip(questions, found, strict=True)
            )
        )
    return [dict(zip(ids, row, strict=True)) for ids, row in zip(found, gains, strict=True)]
