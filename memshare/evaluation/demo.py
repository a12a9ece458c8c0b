"""What the demo measures once its traffic has ended, and the report it makes of it.

Everything is measured on test questions that no pool ever held, against the world's own answers.
Which memories are relevant to a question is the world's knowledge too: those of the same group.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memshare.config import Config
from memshare.evaluation.arms import (
    SHOT_NAMES,
    Arm,
    answer_arm,
    ranked_memories,
    retrieval,
    shot_arms,
)
from memshare.evaluation.data import Pair
from memshare.evaluation.rankers import Ranker, bm25_ranker, dense_ranker, random_ranker
from memshare.evaluation.report import Plot, Series, Table, machine
from memshare.evaluation.traffic import Traffic
from memshare.llm.agent import Agent
from memshare.llm.factory import make_llm
from memshare.metrics.bertscore import BertScorer
from memshare.metrics.ir import METRICS, mean_metrics
from memshare.metrics.stats import paired_bootstrap
from memshare.pocket.world import Splits, Task
from memshare.pool.store import PoolStore
from memshare.progress import track
from memshare.records import Memory
from memshare.retrieval.build import memory_vectors
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.encoder_folder import resolve_encoder
from memshare.retrieval.generation import Generation, generations, load_current
from memshare.retrieval.manifest import GenerationError, Manifest, folder_name
from memshare.version import commit

SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)
RETRIEVERS = ("random", "bm25", "frozen", "trained")


@dataclass(frozen=True)
class Material:
    """The pool in its order of storing, the test questions, and the key of every prompt."""

    memories: Sequence[Memory]
    tests: Sequence[Task]
    keys: Mapping[str, str]  # prompt -> group

    @property
    def questions(self) -> list[str]:
        """The bare test questions."""
        return [task.prompt for task in self.tests]

    @property
    def pairs(self) -> list[Pair]:
        """Test questions with their right answers."""
        return [Pair(task.prompt, task.answer) for task in self.tests]

    def relevant(self) -> list[set[str]]:
        """For each test the ids of the memories whose group is the test's."""
        by_key: dict[str, set[str]] = {}
        for memory in self.memories:
            by_key.setdefault(self.keys[memory.prompt], set()).add(memory.id)
        return [by_key.get(task.key, set()) for task in self.tests]


async def measure(
    config: Config, material: Material, agent: Agent, bert: BertScorer, serving: Generation
) -> dict[str, Any]:
    """The report's ``bertscore``, ``retrieval`` and ``growth`` parts, with their intervals."""
    memories, seed = material.memories, config.run.seed
    by_id = {memory.id: memory for memory in memories}
    trained = serving.encoder
    vectors = memory_vectors(trained, memories, serving)
    best = dense_ranker(memories, trained, vectors)
    rankers: dict[str, Ranker] = {
        "random": random_ranker(memories, seed),
        "bm25": bm25_ranker(memories, config.bm25),
        "frozen": dense_ranker(memories, Encoder.load(config.encoder)),
        "trained": best,
    }
    found = retrieval(rankers, material.questions, material.relevant())
    shots = ranked_memories(best, by_id, material.questions, 3)
    arms = await shot_arms(agent, bert, material.pairs, shots)
    growth: dict[float, Arm] = {}
    for share in track(SHARES, "growth"):
        if share == 1.0:
            growth[share] = arms["three_shot"]
            continue
        part = memories[: max(1, round(share * len(memories)))]
        ranker = dense_ranker(part, trained, vectors[: len(part)])
        shots = ranked_memories(ranker, by_id, material.questions, 3)
        growth[share] = await answer_arm(agent, bert, material.pairs, shots)
    gain = paired_bootstrap(arms["three_shot"].f1, arms["zero_shot"].f1, seed=seed)
    mrr = {name: [row["MRR@10"] for row in rows.values()] for name, rows in found.items()}
    return {
        "bertscore": {name: arm.summary(seed) for name, arm in arms.items()},
        "three_shot_minus_zero_shot_f1": gain._asdict(),
        "retrieval": {name: mean_metrics(rows) for name, rows in found.items()},
        "trained_minus_frozen_mrr10": paired_bootstrap(
            mrr["trained"], mrr["frozen"], seed=seed
        )._asdict(),
        "trained_minus_bm25_mrr10": paired_bootstrap(
            mrr["trained"], mrr["bm25"], seed=seed
        )._asdict(),
        "growth": {f"{share:.0%}": arm.summary(seed) for share, arm in growth.items()},
    }


def record(config: Config, pool: str, splits: Splits, traffic: Traffic) -> dict[str, Any]:
    """Everything that report.json holds, measured through what was published and stored."""
    bert = BertScorer(resolve_encoder(config.scorer.bertscore_model))
    llm = make_llm(config.agent_llm)
    home = config.retriever_dir
    with PoolStore.open(config.url) as store:
        stats = store.stats(pool)
        memories = list(store.iter(pool))
    keys = {task.prompt: task.key for task in (*splits.seed, *splits.problems)}
    material = Material(memories, splits.test, keys)
    serving = load_current(home)
    if serving is None:
        raise GenerationError(f"nothing was published under {home}")
    generation = serving

    async def measured() -> dict[str, Any]:
        try:
            agent = Agent(llm, config.agent)
            return await measure(config, material, agent, bert, generation)
        finally:
            await llm.aclose()

    figures = asyncio.run(measured())
    decisions = dict(stats.decisions)
    return {
        **figures,
        "bertscore_model": {"name": config.scorer.bertscore_model, "layer": bert.layer},
        "memories": {
            "seed": len(splits.seed),
            "taught": sum(task.taught for task in splits.problems),
            "accepted": decisions.pop("stored", 0),
            "rejected": decisions,
            "in_pool": stats.memories,
        },
        "generations": [
            _generation(home, manifest, pool, traffic) for manifest in generations(home)
        ],
        "requests": traffic.record(),
        "model": llm.model,
        "encoder": config.encoder.model,
        "seed": config.run.seed,
        "machine": machine(),
        "commit": commit(),
    }


def _generation(home: Path, manifest: Manifest, pool: str, traffic: Traffic) -> dict[str, Any]:
    folder = home / folder_name(manifest.number)
    metrics = json.loads((folder / "metrics.json").read_text())
    return {
        "id": manifest.number,
        "position": manifest.positions[pool],
        "gate": metrics["gate"],
        "build_seconds": metrics["build_seconds"],
        "swap_seconds": traffic.swaps.get(manifest.number),
    }


def _gate_gain(gate: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Mean and lower bound of the MRR@10 difference; a first generation had nothing to beat."""
    gain = gate.get("differences", {}).get("current", {}).get("MRR@10")
    return (gain["mean"], gain["low"]) if gain else (None, None)


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """The facts at the head of the report."""
    return {
        "agent LLM": record["model"],
        "encoder": record["encoder"],
        "seed": record["seed"],
        "machine": f"{record['machine']['cpu']}, {record['machine']['cores']} cores",
        "commit": record["commit"],
        "seconds in all": round(record["seconds"]),
    }


def tables(record: Mapping[str, Any]) -> list[Table]:
    """The demo's tables, in the order in which they tell the story."""
    shots = record["bertscore"]
    memories = record["memories"]
    return [
        Table(
            "Answers by number of shots",
            ("shots", "precision", "recall", "F1", "95 % low", "high", "n"),
            [
                [name.replace("_", " "), *(shots[name][k] for k in
                 ("precision", "recall", "f1", "f1_low", "f1_high", "n"))]
                for name in SHOT_NAMES
            ],
            note=f"BERTScore by {record['bertscore_model']['name']}, layer "
            f"{record['bertscore_model']['layer']}, on questions the pool never held.",
        ),
        Table(
            "Retrieval of relevant memories",
            ("retriever", *METRICS),
            [[name, *(record["retrieval"][name][m] for m in METRICS)] for name in RETRIEVERS],
            note="Same held-out questions; a memory is relevant if it shows the same hidden rule.",
        ),
        Table(
            "Generations",
            ("generation", "pool position", "MRR@10 gain", "95 % low", "build s", "swap s"),
            [
                [g["id"], g["position"], *_gate_gain(g["gate"]), g["build_seconds"],
                 g["swap_seconds"]]
                for g in record["generations"]
            ],
            note="Gate: MRR@10 on held-out memories against the generation it replaced.",
        ),
        Table(
            "Memories and requests",
            ("what", "count"),
            [
                ["seed memories", memories["seed"]],
                ["accepted", memories["accepted"]],
                *([f"rejected: {why}", n] for why, n in sorted(memories["rejected"].items())),
                ["requests answered", record["requests"]["answered"]],
                ["requests failed", record["requests"]["failed"]],
            ],
        ),
    ]  # fmt: skip


def plots(record: Mapping[str, Any]) -> list[Plot]:
    """Answers by shots, retrievers side by side, growth of the pool."""

    def f1(label: str, rows: Sequence[Mapping[str, float]]) -> Series:
        return Series(
            label,
            [row["f1"] for row in rows],
            [row["f1_low"] for row in rows],
            [row["f1_high"] for row in rows],
        )

    growth = record["growth"]
    return [
        Plot(
            "shots", "Answer quality by number of shots", "bars", ("zero", "one", "two", "three"),
            [f1("F1", [record["bertscore"][name] for name in SHOT_NAMES])],
            "memories shown", "BERTScore F1",
        ),
        Plot(
            "retrieval", "Finding relevant memories", "bars", METRICS,
            [Series(name, [record["retrieval"][name][m] for m in METRICS]) for name in RETRIEVERS],
            "metric", "mean over held-out questions",
        ),
        Plot(
            "growth", "Answer quality as the pool grows", "lines", tuple(growth),
            [f1("three-shot F1", list(growth.values()))],
            "share of the pool", "BERTScore F1",
        ),
    ]  # fmt: skip
