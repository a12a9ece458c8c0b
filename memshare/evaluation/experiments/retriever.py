"""Which retriever finds memories that help: words, vectors, both; trained how; how far to go?"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from memshare.config import LoRAConfig
from memshare.evaluation.arms import retrieval
from memshare.evaluation.data import Domain, Pair
from memshare.evaluation.experiment import Experiment, View
from memshare.evaluation.lab import Lab
from memshare.evaluation.material import as_memories, relevant_ids
from memshare.evaluation.measures import CHRF, F1
from memshare.evaluation.rankers import Ranker, bm25_ranker, fused_ranker
from memshare.evaluation.rows import DECONTAMINATED, Key, Row, mean_row, question_keys
from memshare.llm.base import ContextTooLong
from memshare.llm.likelihood import Likelihood
from memshare.metrics.ir import METRICS
from memshare.records import Memory, normalise

RANDOM = "random draw"  # the model of rows for which nothing ranked
# arm -> (iterations, changed settings of `training`)
TRAINED: dict[str, tuple[int, Mapping[str, Any]]] = {
    "trained": (1, {}),
    "two iterations": (2, {}),
    "three iterations": (3, {}),
    "query-only": (1, {"towers": "query-only"}),
    "LoRA": (1, {"lora": LoRAConfig(enabled=True)}),
}


async def rows(lab: Lab) -> AsyncIterator[Row]:
    """Three shots by each retriever; for the pocket world also what it finds (MRR@10, ...).

    ``oracle`` ranks the candidates of BM25 and the frozen encoder by the scorer LM's likelihood of
    the reference answer: it knows what it is to find out, and bounds what labels could teach.
    """
    domains = lab.sampled()
    pools = {name: as_memories(name, domain.pairs) for name, domain in domains.items()}
    encoders = {}
    for arm, (iterations, changed) in TRAINED.items():
        encoders[arm] = (await lab.learn(pools, iterations, training=changed)).encoder
    for name, domain in domains.items():
        memories = pools[name]
        words, frozen = bm25_ranker(memories, lab.config.bm25), lab.dense(memories, lab.encoder)
        rankers: dict[str, Ranker] = {
            "random": lab.random(memories),
            "BM25": words,
            "frozen": frozen,
            **{arm: lab.dense(memories, encoder) for arm, encoder in encoders.items()},
        }
        rankers["BM25 + trained"] = fused_ranker([words, rankers["trained"]])
        rankers["oracle"] = await oracle(lab, domain, memories, [words, frozen])
        for row in await lab.answers(rankers, domain, memories):
            yield row
        if domain.keys:
            by = {"random": RANDOM, "BM25": "BM25", "oracle": lab.scorer_name,
                  "BM25 + trained": f"BM25 + {lab.encoder_name}"}  # fmt: skip
            for row in found(lab, domain, memories, rankers, by=by):
                yield row


async def oracle(
    lab: Lab, domain: Domain, memories: Sequence[Memory], proposers: Sequence[Ranker]
) -> Ranker:
    """Ranks each test's candidates by how likely they make its reference answer."""
    likelihood = Likelihood(lab.scorer_llm, instruction=lab.config.agent.instruction)
    counts = lab.config.mining.candidates, lab.config.mining.dense_candidates
    by_id = {memory.id: memory for memory in memories}

    async def worth(test: Pair, id_: str) -> tuple[float, str]:
        shot = (by_id[id_].prompt, by_id[id_].answer)
        try:
            return await likelihood.score(test.prompt, test.answer, [shot]), id_
        except ContextTooLong:
            return float("-inf"), id_

    ranks: dict[str, list[str]] = {}
    for tests in domain.tests.values():
        proposed = [
            ranker([test.prompt for test in tests], count)
            for ranker, count in zip(proposers, counts, strict=True)
            if count
        ]
        for test, *ids in zip(tests, *proposed, strict=True):
            candidates = dict.fromkeys(id_ for row in ids for id_ in row)
            scored = await asyncio.gather(*(worth(test, id_) for id_ in candidates))
            ranks[normalise(test.prompt)] = [id_ for _, id_ in sorted(scored, reverse=True)]
    return lambda questions, k: [ranks[normalise(question)][:k] for question in questions]


def found(
    lab: Lab, domain: Domain, memories: Sequence[Memory], rankers: Mapping[str, Ranker],
    at: str = "", by: Mapping[str, str] | None = None,
) -> list[Row]:  # fmt: skip
    """What every retriever finds of ``memories`` that are of a test's group, where it is known.

    ``by``: what ranks in an arm, if it is not the encoder; that is the rows' ``model``.
    """
    made = []
    for dataset, tests in domain.tests.items():
        prompts = [test.prompt for test in tests]
        per_arm = retrieval(rankers, prompts, relevant_ids(domain, memories, tests))
        names = question_keys(prompts)
        for arm, per_question in per_arm.items():
            for metric in METRICS:
                values = {name: per_question[str(i)][metric] for i, name in enumerate(names)}
                model = (by or {}).get(arm, lab.encoder_name)
                key = Key(arm, at, dataset, metric, model, DECONTAMINATED)
                made.append(mean_row(key, values, lab.seed))
    return made


EXPERIMENT = Experiment(
    "retriever",
    "Which retriever's memories help most, does training make it better, and how far is it from an "
    "oracle that knows the answer?",
    rows,
    contrasts=(
        ("BM25", "random"), ("frozen", "random"), ("frozen", "BM25"), ("trained", "frozen"),
        ("two iterations", "trained"), ("three iterations", "trained"), ("query-only", "trained"),
        ("LoRA", "trained"), ("BM25 + trained", "trained"), ("oracle", "trained"),
    ),
    shown=(F1, CHRF, *METRICS),
    tested=(F1, CHRF, "MRR@10"),
    views=(View("Three shots by each retriever", "rows", "retriever"),),
)  # fmt: skip
