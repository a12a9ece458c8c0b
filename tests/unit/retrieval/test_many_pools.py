"""One encoder, hundreds of pools: nothing of one pool is ever found through another."""

from __future__ import annotations

import random
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from memshare.records import NewMemory
from memshare.retrieval.delta import Shard
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.index import FlatIndex
from memshare.retrieval.searcher import Searcher
from memshare.retrieval.serving import Query, Serving
from tests.retrieving import make_config, open_store, publish_now, sentence
from tests.tiny import tiny_encoder

POOLS = tuple(f"pool-{i:03d}" for i in range(300))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("encoder") / "tiny")


def test_three_hundred_pools(tmp_path: Path, encoder: Path) -> None:
    """Every pool has the same texts, so that only the pool can tell them apart."""
    config = make_config(tmp_path / "run", encoder, POOLS)
    rng = random.Random(0)
    texts = [(sentence(rng), sentence(rng)) for _ in range(6)]
    with open_store(config) as store:

        def write(part: list[tuple[str, str]]) -> dict[str, str]:
            new = [NewMemory(pool, *text) for pool in POOLS for text in part]
            added = store.append(new)
            return {result.id: memory.pool for result, memory in zip(added, new, strict=True)}

        owner = write(texts[:4])  # in the indexes
        publish_now(store, config, Encoder.from_folder(encoder, device="cpu"))
        owner |= write(texts[4:])  # in the deltas
        with Searcher(store, config) as searcher:
            searcher.wait_ready(120)
            for pool in POOLS:
                answer = searcher.search(pool, texts[5][0], 100, timeout=60)
                found = [hit.id for hit in answer.hits]
                assert answer.generation == 1
                assert len(set(found)) == 6 and {owner[id] for id in found} == {pool}
            # The same questions at once, several pools in a batch.
            futures = [
                searcher._submit(Query(pool, texts[i][0], 6), 60)
                for i in range(2)
                for pool in POOLS
            ]
            for pool, future in zip(POOLS * 2, futures, strict=True):
                assert {owner[hit.id] for hit in future.result(60).hits} == {pool}
            assert searcher.stats().batches < 300 + len(futures)


def test_a_pool_costs_its_rows(encoder: Path) -> None:
    """Memory and time of serving grow with the number of pools as a line does, and little."""

    def cost(pools: int) -> tuple[float, float]:
        vectors = np.eye(32, dtype=np.float32)[:10]
        ids = np.array([f"m{i}".encode() for i in range(10)])
        tracemalloc.start()
        began = time.process_time()
        shards = {f"p{i}": Shard(32, FlatIndex.build(vectors), ids, 10) for i in range(pools)}
        serving = Serving(1, Encoder.from_folder(encoder, device="cpu"), shards)
        for shard in shards.values():
            shard.top(vectors[:1], 3)
        serving.snapshot()
        seconds = time.process_time() - began
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return held, seconds

    cost(1)
    small, large = cost(50), cost(800)
    assert (large[0] - small[0]) / 750 < 20_000  # bytes a pool, ten rows of them
    assert (large[1] - small[1]) / 750 < 0.01  # seconds
