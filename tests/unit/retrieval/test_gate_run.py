"""Running the gate: who is compared, over which memories, and what the settings change."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from memshare.config import Config, GateConfig, IndexConfig
from memshare.pool.store import PoolStore
from memshare.records import Memory
from memshare.retrieval import approximate
from memshare.retrieval.bm25 import BM25
from memshare.retrieval.build import build_generation
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.gate import GateResult
from memshare.retrieval.gate_run import Relevance, gate_built
from memshare.retrieval.generation import generations
from memshare.retrieval.text import memory_text
from tests.retrieving import fill, publish_now


async def all_alike(query: Memory, candidates: Sequence[Memory]) -> list[float]:
    return [0.4] * len(candidates)


def gate(
    store: PoolStore, config: Config, encoder: Encoder, queries: Sequence[Memory],
    relevance: Relevance = all_alike, **settings: float,
) -> GateResult:  # fmt: skip
    config = config.model_copy(update={"gate": GateConfig.model_validate(settings)})
    built = build_generation(store, config, encoder)
    return gate_built(store, config, encoder, built, queries, relevance)


def test_questions_are_as_many_as_asked_for(
    store: PoolStore, config: Config, encoders: list[Encoder]
) -> None:
    memories = fill(store, "p", 8)
    assert gate(store, config, encoders[0], memories).queries == 8
    assert gate(store, config, encoders[0], memories, max_queries=3).queries == 3


def test_a_small_gain_is_none(store: PoolStore, config: Config, encoders: list[Encoder]) -> None:
    memories = fill(store, "p", 8)
    assert gate(store, config, encoders[0], memories, gain=0.3).queries == 8
    nothing = gate(store, config, encoders[0], memories, gain=0.5)
    assert (nothing.queries, nothing.reason) == (0, "no held-out query has a relevant memory")


def test_what_bm25_finds_is_judged_too_and_no_more_of_each_than_asked_for(
    store: PoolStore, config: Config, encoders: list[Encoder]
) -> None:
    memories = fill(store, "p", 60)
    judged: dict[str, set[str]] = {}

    async def remember(query: Memory, candidates: Sequence[Memory]) -> list[float]:
        judged[query.id] = {memory.id for memory in candidates}
        return await all_alike(query, candidates)

    gate(store, config, encoders[0], memories[:5], remember, depth=3)
    texts = [memory_text(memory.prompt, memory.answer) for memory in memories]
    index = BM25(config.bm25).fit([memory.id for memory in memories], texts)
    for query in memories[:5]:
        (found,) = index.top([query.prompt], 3, [{query.id}])
        assert {memory_id for memory_id, _ in found} <= judged[query.id]
        assert len(judged[query.id]) <= 3 + 3  # the current one is the next one: the same three


def test_the_configured_encoder_may_be_the_best_so_far(
    store: PoolStore, config: Config, encoders: list[Encoder]
) -> None:
    async def same_agent(query: Memory, candidates: Sequence[Memory]) -> list[float]:
        return [float(memory.agent == query.agent) for memory in candidates]

    memories = fill(store, "p", 12)
    publish_now(store, config, encoders[1], best=0)
    verdict = gate(store, config, encoders[0], memories, same_agent)
    assert verdict.record()["generations"] == {"current": 1, "best": 0}
    # The next one's encoder is the configured one.
    assert verdict.figures["best"] == verdict.figures["next"] != verdict.figures["current"]


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_encoders_are_compared_by_exact_search(
    store: PoolStore, config: Config, encoders: list[Encoder], kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What an approximate index misses is no fault of the encoder that serves by it."""
    monkeypatch.setattr(approximate, "_GATHER", 0)  # as if the pool were large
    monkeypatch.setattr(approximate, "_GATHER_SHARE", 1000)
    settings = {"kind": kind, "approximate_from": 1, "nlist": 5, "nprobe": 1, "recall_floor": 0.0,
                "links": 4, "ef_construction": 1, "ef_search": 1}  # fmt: skip
    index = IndexConfig.model_validate(settings)
    retriever = config.retriever.model_copy(update={"index": index})
    config = config.model_copy(update={"retriever": retriever})
    memories = fill(store, "p", 200)
    for best in (None, 1):
        publish_now(store, config, encoders[0], best=best)
    assert generations(config.retriever_dir)[0].recall_at_10["p"] < 0.9

    async def same_agent(query: Memory, candidates: Sequence[Memory]) -> list[float]:
        return [float(memory.agent == query.agent) for memory in candidates]

    verdict = gate(store, config, encoders[0], memories, same_agent)
    assert verdict.record()["generations"] == {"current": 2, "best": 1}
    for name in ("current", "best"):
        assert verdict.figures[name] == verdict.figures["next"]


def test_all_search_what_came_while_the_next_one_was_built(
    store: PoolStore, config: Config, encoders: list[Encoder]
) -> None:
    queries = fill(store, "p", 3)
    publish_now(store, config, encoders[0], best=0)
    built = build_generation(store, config, encoders[0])
    fill(store, "p", 4, seed=1)
    verdict = gate_built(store, config, encoders[0], built, queries, all_alike)
    for name in ("current", "best"):
        assert verdict.figures[name] == verdict.figures["next"]
    assert verdict.figures["next"]["recall@10"] == 1


def test_all_search_as_they_would_serve(
    store: PoolStore, config: Config, encoders: list[Encoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    memories = fill(store, "p", 6)
    for encoder in encoders[:2]:
        publish_now(store, config, encoder, best=1)
    half = config.encoder.model_copy(update={"precision": "bf16"})
    config = config.model_copy(update={"encoder": half})
    seen: list[bool] = []
    encode = Encoder.encode_queries

    def remember(encoder: Encoder, prompts: Sequence[str]) -> np.ndarray:
        seen.append(encoder.bf16)
        return encode(encoder, prompts)

    monkeypatch.setattr(Encoder, "encode_queries", remember)
    verdict = gate(store, config, encoders[0], memories)
    assert verdict.record()["generations"] == {"current": 2, "best": 1}
    assert len(seen) >= 3 and all(seen)
