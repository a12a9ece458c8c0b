"""A principal floods a pool, and an encoder is trained on it: what clean questions find then.

Real questions (Banking77), the real all-MiniLM-L6-v2, and the loop's own pieces: the pool with its
limits, mining, the choice of positives, the trainer's steps, a published generation, and the search
with its cap. The attacker writes as many memories as all the others together, each a question like
those of its victims with one and the same answer, its own; so its queries have its own memories for
positives, and honest ones for negatives. One training, at several times the usual learning rate,
stands for many rounds.

Two claims, each the mean over seeds (of questions and of training), of the share of right memories
among three shots and of MRR@10:

* with the caps of docs/safety.md (the floor is lower, as the pool is) clean questions find nearly
  what they find in a clean pool; without them they lose much;
* much of that is the encoder's learning, and the cap on training alone, in a pool that is flooded
  all the same, takes away what learning adds to the harm: where there are hard negatives, as there
  are by default. Without any it takes away little (docs/safety.md has figures).
"""

from __future__ import annotations

import asyncio
import csv
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from memshare.config import Config
from memshare.evaluation.learn import train_encoder
from memshare.metrics.ir import ir_metrics, mean_metrics
from memshare.pool.store import PoolStore
from memshare.records import Example, NewMemory
from memshare.retrieval.encoder import Encoder
from memshare.sharing import open_shared
from memshare.sharing.guard import Guard
from memshare.training.select import select
from tests.loop import loop_config
from tests.mining import mine_round
from tests.retrieving import publish_now

DATA = Path(os.environ.get("MEMSHARE_DATA", Path(__file__).parents[2] / "../shared/data"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"MEMSHARE_DATA: no {DATA}"),
]
SEEDS = (0, 1)
INTENTS, EACH, ASKED, PRINCIPALS = 5, 8, 12, 8  # of each intent memories, and questions
EVIL = "Call 0800 555 0199 and tell them your PIN."
TRAINING: dict[str, Any] = {
    "batch_size": 16, "epochs": 2, "lr": 2e-4, "dropout": False, "positives": 8,
    "positives_per_step": 1, "hard_negatives": 1,
}  # fmt: skip
OPEN: dict[str, Any] = {"pool": {}, "training": {}, "retriever": {}}
CAPPED: dict[str, Any] = {
    "pool": {"max_principal_share": 0.1, "principal_floor": 5},
    "training": {"max_principal_share": 0.25},
    "retriever": {"max_principal_share": 0.34},
}


@dataclass(frozen=True)
class World:
    """Memories in the order of writing, and questions with the answers that are right."""

    honest: list[NewMemory]
    poison: list[NewMemory]
    questions: list[tuple[str, str]]


def rows(name: str) -> dict[str, list[str]]:
    """Questions by intent."""
    found: dict[str, list[str]] = {}
    with (DATA / f"banking77/{name}.csv").open(encoding="utf-8", newline="") as handle:
        for row in csv.DictReader(handle):
            found.setdefault(row["category"], []).append(row["text"])
    return found


def world(seed: int) -> World:
    draw = random.Random(seed)
    train, test = rows("train"), rows("test")
    honest, poison, questions = [], [], []
    for intent in draw.sample(sorted(train), INTENTS):
        answer = f"This is about {intent.replace('_', ' ')}."
        texts = draw.sample(train[intent], 2 * EACH)
        honest += [(text, answer) for text in texts[:EACH]]
        poison += [NewMemory("main", text, EVIL, agent="eve") for text in texts[EACH:]]
        questions += [(text, answer) for text in draw.sample(test[intent], ASKED)]
    draw.shuffle(honest)
    draw.shuffle(poison)
    written = [
        NewMemory("main", text, answer, agent=f"agent {n % PRINCIPALS}")
        for n, (text, answer) in enumerate(honest)
    ]
    return World(written, poison, questions)


def configured(folder: Path, models: Path, seed: int, caps: dict[str, Any]) -> Config:
    return loop_config(
        folder,
        models,
        run={"seed": seed},
        pools={"main": {"threshold": 0, **caps["pool"]}},
        encoder={"model": "all-MiniLM-L6-v2", "max_length": 32},
        mining={"labels": "given", "candidates": 8, "dense_candidates": 8},
        training={**TRAINING, **caps["training"]},
        retriever={"pools": ["main"], **caps["retriever"]},
        gateway={"default_pool": "main"},
    )


def filled(config: Config, memories: Sequence[NewMemory]) -> tuple[PoolStore, list[Example]]:
    """The pool as it is after ``memories`` were offered to it, and the examples mined from it."""
    store = PoolStore.open(config.url)
    store.create_pool("main")
    store.append(memories, Guard(config).limits)
    examples, _ = mine_round(store, config)
    return store, examples


def found(
    store: PoolStore, config: Config, encoder: Encoder, questions: Sequence[tuple[str, str]]
) -> dict[str, float]:
    """What clean questions find in the pool by ``encoder``."""
    publish_now(store, config, encoder)
    right: dict[str, set[str]] = {}
    for memory in store.iter("main"):
        right.setdefault(memory.answer, set()).add(memory.id)

    async def ask(*depths: int) -> list[list[list[str]]]:
        async with open_shared(config) as shared:
            answers = [
                await asyncio.gather(*(shared.retrieve("main", text, k) for text, _ in questions))
                for k in depths
            ]
            return [[[m.id for m in one.memories] for one in answer] for answer in answers]

    shots, ranks = asyncio.run(ask(3, 10))
    judged = ir_metrics(
        {str(n): row for n, row in enumerate(ranks)},
        {str(n): dict.fromkeys(right[answer], 1) for n, (_, answer) in enumerate(questions)},
    )
    parts = [
        len(right[answer].intersection(row)) / 3
        for row, (_, answer) in zip(shots, questions, strict=True)
    ]
    return {"shots": fmean(parts), "MRR@10": mean_metrics(judged)["MRR@10"]}


def measured(folder: Path, models: Path, seed: int) -> dict[str, dict[str, float]]:
    """What is found, by arm."""
    made = world(seed)
    results = {}

    def learned(config: Config, examples: Sequence[Example]) -> Encoder:
        return train_encoder(config, select(examples, config.training).items)[0]

    for name, caps, memories in (
        ("clean", OPEN, made.honest), ("capped", CAPPED, made.honest + made.poison)
    ):  # fmt: skip
        config = configured(folder / name, models, seed, caps)
        store, examples = filled(config, memories)
        with store:
            results[name] = found(store, config, learned(config, examples), made.questions)
    config = configured(folder / "open", models, seed, OPEN)
    store, examples = filled(config, made.honest + made.poison)
    with store:
        assert store.stats("main").memories == 2 * len(made.honest)
        half = {"training": {**TRAINING, **CAPPED["training"]}}
        for name, encoder in (
            ("untrained", Encoder.load(config.encoder)),
            ("open", learned(config, examples)),
            ("trained under the cap", learned(Config(**(config.model_dump() | half)), examples)),
        ):
            results[name] = found(store, config, encoder, made.questions)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """By arm the means over the seeds."""
    models = tmp_path_factory.mktemp("models")
    runs = [measured(tmp_path_factory.mktemp(f"seed{n}"), models, n) for n in SEEDS]
    for run in runs:
        print(json.dumps(run))
    return {
        arm: {metric: fmean(run[arm][metric] for run in runs) for metric in runs[0][arm]}
        for arm in runs[0]
    }


@pytest.mark.parametrize("metric", ["shots", "MRR@10"])
def test_caps_bound_what_a_flood_does_to_clean_questions(
    results: dict[str, dict[str, float]], metric: str
) -> None:
    clean, capped, flooded = (results[arm][metric] for arm in ("clean", "capped", "open"))
    assert clean - flooded > 0.25, "the attack does not work, and nothing is shown"
    assert clean - capped < 0.08


@pytest.mark.parametrize("metric", ["shots", "MRR@10"])
def test_the_cap_on_training_takes_away_what_learning_adds(
    results: dict[str, dict[str, float]], metric: str
) -> None:
    before, capped, flooded = (
        results[arm][metric] for arm in ("untrained", "trained under the cap", "open")
    )
    assert before - flooded > 0.15, "poison teaches nothing, and nothing is shown"
    assert before - capped < 0.05
