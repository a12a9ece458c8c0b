"""Pools of real texts, and one round of mining over them, for tests."""

from __future__ import annotations

import asyncio
import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest

from memshare.config import Config, load_config
from memshare.pool.store import PoolStore
from memshare.records import Example, NewMemory
from memshare.training.examples import read_examples, round_dir
from memshare.training.journal import Span
from memshare.training.labels import open_labeller
from memshare.training.mining import mine
from memshare.training.mining_plan import plan_round, split_memories
from memshare.training.proposals import open_proposer
from memshare.training.rounds import open_spans

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("MEMSHARE_DATA", ROOT / "../shared/data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"MEMSHARE_DATA: no {DATA}")


def plans() -> list[NewMemory]:
    rows = [json.loads(line) for line in (DATA / "nine/plan/pool.jsonl").open(encoding="utf-8")]
    turns = [[turn["content"] for turn in row["messages"]] for row in rows]
    return [NewMemory("main", prompt, answer, agent="seed") for prompt, answer in turns]


def banking(per_intent: int, intents: int) -> list[NewMemory]:
    with (DATA / "banking77/train.csv").open(encoding="utf-8", newline="") as handle:
        rows = [(row["text"], row["category"]) for row in csv.DictReader(handle)]
    labels = list(dict.fromkeys(label for _, label in rows))[:intents]
    return [
        NewMemory("main", text, label, metadata={"label": label})
        for label in labels
        for text in [text for text, own in rows if own == label][:per_intent]
    ]


def make_config(folder: Path, **mining: Any) -> Config:
    items = {"labels": "given", "candidates": 5, "dense_candidates": 0, "shard_rows": 16, **mining}
    sets = [f"mining.{key}={value}" for key, value in items.items()]
    return load_config(None, [f"run.dir={folder}", *sets])


def open_pool(config: Config, memories: list[NewMemory]) -> PoolStore:
    config.run.dir.mkdir(parents=True, exist_ok=True)
    store = PoolStore.open(config.url)
    store.create_pool("main")
    store.append(memories)
    return store


def mine_round(
    store: PoolStore, config: Config, number: int = 1, spans: dict[str, Span] | None = None
) -> tuple[list[Example], dict[str, Any]]:
    async def run() -> dict[str, Any]:
        fates = split_memories(store, config)
        folder = round_dir(config.examples_dir, number)
        wanted = spans or open_spans(store, {}, ("main",))
        with open_proposer(config, None) as proposer:
            by = proposer and proposer.name
            plan = plan_round(store, config, number, wanted, fates, folder, by)
            async with open_labeller(config, store) as labeller:
                return await mine(store, config, plan, fates, labeller, folder, proposer)

    marker = asyncio.run(run())
    return list(read_examples(round_dir(config.examples_dir, number))), marker
