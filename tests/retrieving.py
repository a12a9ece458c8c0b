"""Pools, configurations and generations for tests of the retriever: real parts, tiny sizes."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memshare.config import Config
from memshare.pool.store import PoolStore
from memshare.records import Memory, NewMemory, SearchAnswer
from memshare.retrieval.build import build_generation
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.publish import publish
from memshare.retrieval.searcher import Searcher

WORDS = [
    "river", "stone", "lamp", "wolf", "paper", "green", "cloud", "salt", "clock", "bread", "tower",
    "field", "horse", "glass", "storm", "apple", "night", "wheel", "snow", "iron",
]  # fmt: skip


def sentence(rng: random.Random, length: int = 6) -> str:
    """Random words."""
    return " ".join(rng.choice(WORDS) for _ in range(length))


def make_config(
    run_dir: Path, encoder: Path, pools: tuple[str, ...] = ("p",), **more: Any
) -> Config:
    """A configuration whose searcher reacts at once."""
    retriever = {"poll_seconds": 0.02, "batch_wait_seconds": 0.001, "gpu": "off", **more}
    return Config(
        run={"dir": run_dir},
        pools={pool: {} for pool in pools},
        encoder={"model": str(encoder), "device": "cpu"},
        retriever=retriever,
    )


def open_store(config: Config) -> PoolStore:
    """The configuration's store with its pools made."""
    store = PoolStore.open(config.url)
    for pool in config.pools:
        store.create_pool(pool)
    return store


def fill(store: PoolStore, pool: str, count: int, seed: int = 0) -> list[Memory]:
    """Append ``count`` random memories by three agents, a day apart."""
    rng = random.Random(f"{pool} {seed}")
    added = store.append(
        [
            NewMemory(
                pool=pool,
                prompt=f"{sentence(rng)} {seed} {i}",
                answer=sentence(rng),
                agent=rng.choice(["ann", "bob", None]),
                created_at=f"2026-{1 + i // 28 % 12:02d}-{1 + i % 28:02d}T00:00:00Z",
            )
            for i in range(count)
        ]
    )
    found = store.get_many([result.id for result in added])
    return [found[result.id] for result in added]


def publish_now(
    store: PoolStore, config: Config, encoder: Encoder, parent: int | None = None, **more: Any
) -> int:
    """Build and publish every pool as it is now."""
    built = build_generation(store, config, encoder)
    options: dict[str, Any] = {
        "metrics": {}, "keep": config.retriever.keep, "index": config.retriever.index, **more
    }  # fmt: skip
    return publish(
        config.retriever_dir, encoder=encoder, parent=parent,
        **built.parts(), **options,
    )  # fmt: skip


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for ``condition``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def serves(searcher: Searcher, number: int) -> None:
    """Wait until generation ``number`` serves."""
    until(lambda: searcher.stats().generation == number)


def ids(answer: SearchAnswer) -> list[str]:
    """The ids found, best first."""
    return [hit.id for hit in answer.hits]


def find(searcher: Searcher, memory: Memory, k: int = 1000) -> list[str]:
    """The ids that a search for ``memory`` itself finds."""
    return ids(searcher.search(memory.pool, f"{memory.prompt}\n{memory.answer}", k))
