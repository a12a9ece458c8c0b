"""Who proposes candidates: BM25 and the serving retriever, checked against brute force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memshare.config import Config, load_config
from memshare.pool.store import PoolStore
from memshare.records import Memory, NewMemory, normalise
from memshare.retrieval.bm25 import BM25
from memshare.retrieval.build import build_generation
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.publish import publish
from memshare.retrieval.text import memory_text
from memshare.training.proposals import PoolProposals, Proposer, open_proposer
from memshare.training.split import Fate
from tests.tiny import tiny_encoder

WORDS = ("tea", "rain", "iron", "moss", "salt", "wool", "echo", "fern", "lamp", "rope")


def memories() -> list[NewMemory]:
    made = [
        NewMemory("main", f"what of {a} and {b}", f"{b} before {a}")
        for i, a in enumerate(WORDS)
        for b in WORDS[i + 1 :]
    ]
    # two copies of one question with answers of their own
    return [*made, *(NewMemory("main", "What of TEA and rain", f"answer {n}") for n in (1, 2))]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    encoder = tiny_encoder(tmp_path / "tiny")
    return load_config(
        None,
        [
            f"run.dir={tmp_path}", f"encoder.model={encoder}", "encoder.device=cpu",
            "mining.labels=given", "mining.candidates=4", "mining.dense_candidates=5",
        ],
    )  # fmt: skip


@pytest.fixture
def store(config: Config) -> PoolStore:
    store = PoolStore.open(config.url)
    store.create_pool("main")
    store.append(memories())
    return store


class _Train(dict[str, Fate]):
    """Nothing is held out."""

    def get(self, *_: Any) -> Fate:
        return "train"


TRAIN = _Train()


def fates_of(found: list[Memory]) -> dict[str, Fate]:
    return {memory.id: "held_out" if i % 7 == 3 else "train" for i, memory in enumerate(found)}


def test_both_propose_and_nothing_forbidden_is_proposed(config: Config, store: PoolStore) -> None:
    found = list(store.iter("main"))
    fates = fates_of(found)
    open_ids = [memory.id for memory in found if fates[memory.id] == "train"]
    by_id = {memory.id: memory for memory in found}
    encoder = Encoder.load(config.encoder)
    vectors = encoder.encode_memories([(by_id[k].prompt, by_id[k].answer) for k in open_ids])
    bm25 = BM25(config.bm25).fit(
        open_ids, [memory_text(by_id[k].prompt, by_id[k].answer) for k in open_ids]
    )
    with open_proposer(config, None) as proposer:
        assert proposer is not None and proposer.name == 0  # nothing was published
        until = store.last_seq("main")
        proposals = PoolProposals(store, config, "main", until, fates, proposer)
        rows = proposals.propose(found)
    only_dense = 0
    for query, row in zip(found, rows, strict=True):
        copies = {k for k in open_ids if normalise(by_id[k].prompt) == normalise(query.prompt)}
        copies.add(query.id)
        words = [k for k, _ in bm25.top([query.prompt], 4, [copies])[0]]
        scores = vectors @ encoder.encode_queries([query.prompt])[0]
        nearest = [open_ids[i] for i in np.argsort(-scores, kind="stable")]
        nearest = [k for k in nearest if k not in copies][:5]
        assert [p.id for p in row if p.bm25_rank is not None] == words
        assert [p.bm25_rank for p in row[: len(words)]] == list(range(len(words)))
        ranked = sorted((p for p in row if p.dense_rank is not None), key=lambda p: p.dense_rank)
        expected = sorted(scores[open_ids.index(k)] for k in nearest)
        assert sorted(scores[open_ids.index(p.id)] for p in ranked) == pytest.approx(expected)
        assert [p.dense_rank for p in ranked] == [0, 1, 2, 3, 4]
        assert len({p.id for p in row}) == len(row) and not copies & {p.id for p in row}
        assert all(fates[p.id] == "train" for p in row)
        only_dense += sum(p.bm25_rank is None for p in row)
    assert only_dense > len(found)  # vectors find what words don't


def test_a_generation_proposes_with_its_own_vectors(
    config: Config, store: PoolStore, tmp_path: Path
) -> None:
    other = Encoder.load(
        config.encoder.model_copy(update={"model": str(tiny_encoder(tmp_path / "two", seed=2))})
    )
    built = build_generation(store, config, other)
    publish(
        config.retriever_dir, encoder=other, **built.parts(),
        metrics={"gate": {}}, parent=None, keep=3,
    )  # fmt: skip
    store.append([NewMemory("main", "what of lamp and lamp", "newer than the generation")])
    found = list(store.iter("main"))
    until = store.last_seq("main")
    with open_proposer(config, None) as proposer:
        assert proposer is not None and proposer.name == 1
        by_generation = PoolProposals(store, config, "main", until, TRAIN, proposer).propose(found)
    encoded = PoolProposals(
        store, config, "main", until, TRAIN, Proposer(other, None, "other")
    ).propose(found)
    assert by_generation == encoded
    with open_proposer(config, str(tmp_path / "two")) as proposer:  # an encoder that is in none
        assert proposer is not None and proposer.name == str(tmp_path / "two")
        assert (
            PoolProposals(store, config, "main", until, TRAIN, proposer).propose(found) == encoded
        )
    gone = str(tmp_path / "moved" / "two")  # with its run folder: the round goes on as it began
    with open_proposer(config, gone, str(tmp_path / "two")) as proposer:
        assert proposer is not None and proposer.name == gone
    with open_proposer(config, str(tmp_path / "two"), gone) as proposer:  # it is still there
        assert proposer is not None and proposer.name == str(tmp_path / "two")
    with open_proposer(config, 0) as proposer:  # a round that was begun before the generation
        assert proposer is not None and proposer.generation is None
        frozen = PoolProposals(store, config, "main", until, TRAIN, proposer).propose(found)
    assert frozen != encoded


def test_what_serves_proposes_in_place_of_a_generation_that_is_gone(
    config: Config, store: PoolStore, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who publishes by hand deletes old ones; a round that began with one goes on all the same."""
    with open_proposer(config, 7) as proposer:  # and nothing else is there
        assert proposer is not None and (proposer.name, proposer.generation) == (7, None)
    encoder = Encoder.load(config.encoder)
    for _ in range(2):
        publish(
            config.retriever_dir, encoder=encoder,
            **build_generation(store, config, encoder).parts(), metrics={}, parent=None, keep=1,
        )  # fmt: skip
    capsys.readouterr()
    with open_proposer(config, 1) as proposer:
        assert proposer is not None and proposer.generation is not None
        assert (proposer.name, proposer.generation.number) == (1, 2)
    assert "no generation 1 any more; what serves now proposes" in capsys.readouterr().err


@pytest.mark.parametrize("name", [None, 1])
def test_a_generation_proposes_in_the_configured_batches_and_precision(
    config: Config, store: PoolStore, name: int | None
) -> None:
    encoder = Encoder.load(config.encoder)
    publish(
        config.retriever_dir, encoder=encoder,
        **build_generation(store, config, encoder).parts(), metrics={}, parent=None, keep=3,
    )  # fmt: skip
    small = config.encoder.model_copy(update={"batch_tokens": 77, "precision": "bf16"})
    config = config.model_copy(update={"encoder": small})
    with open_proposer(config, name) as proposer:
        assert proposer is not None and proposer.name == 1
        assert (proposer.encoder.batch_tokens, proposer.encoder.bf16) == (77, True)


def test_what_came_after_the_round_s_position_is_not_proposed(
    config: Config, store: PoolStore
) -> None:
    found = list(store.iter("main"))
    with open_proposer(config, None) as proposer:
        for by in (None, proposer):
            proposals = PoolProposals(store, config, "main", 3, TRAIN, by)
            (row,) = proposals.propose(found[:1])
            assert {p.id for p in row} == {memory.id for memory in found[1:3]}


def test_a_memory_that_was_never_split_is_not_proposed(config: Config, store: PoolStore) -> None:
    """It came after the round was planned, and may be held out."""
    found = list(store.iter("main"))
    fates: dict[str, Fate] = {memory.id: "train" for memory in found[::9]}
    until = store.last_seq("main")
    (row,) = PoolProposals(store, config, "main", until, fates, None).propose(found[:1])
    assert len(row) == 4 and {p.id for p in row} <= fates.keys()


@pytest.mark.parametrize("setting", ["mining.dense_candidates=0", "mining.labels=none"])
def test_bm25_alone(config: Config, store: PoolStore, setting: str) -> None:
    config = load_config(None, [f"run.dir={config.run.dir}", "encoder.model=/none", setting])
    with open_proposer(config, None) as proposer:
        assert proposer is None  # and no encoder was looked for
        until = store.last_seq("main")
        proposals = PoolProposals(store, config, "main", until, TRAIN, proposer)
        (row,) = proposals.propose(list(store.iter("main"))[:1])
    assert [p.bm25_rank for p in row] == list(range(len(row))) and len(row) == 16
    assert {p.dense_rank for p in row} == {None}


def test_an_empty_pool_proposes_nothing(config: Config) -> None:
    with PoolStore.open(config.url) as store, open_proposer(config, None) as proposer:
        store.create_pool("main")
        proposals = PoolProposals(store, config, "main", 0, TRAIN, proposer)
        query = Memory("q", "main", "what", "that", None, None, None, "2026-01-01", {}, 1)
        assert proposals.propose([query]) == [[]]
        assert proposals.propose([]) == []
