"""The encoder that serves gets a new index where rounds are rejected and memories come on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from memshare.config import Config
from memshare.pool.store import PoolStore
from memshare.retrieval import refresh as module
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.generation import best, current, generations, load
from memshare.retrieval.manifest import GenerationError, first_with, folder_name
from memshare.retrieval.publish import activate
from memshare.retrieval.refresh import refresh
from memshare.retrieval.shelf import Lease, numbers
from tests.retrieving import fill, make_config, open_store, publish_now
from tests.tiny import tiny_encoder

ENOUGH = 5  # changes


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return make_config(tmp_path / "run", tiny_encoder(tmp_path / "encoder"), keep=2)


@pytest.fixture
def store(config: Config, monkeypatch: pytest.MonkeyPatch) -> Iterator[PoolStore]:
    monkeypatch.setattr(module, "MAX_DELTA", ENOUGH)
    with open_store(config) as opened:
        fill(opened, "p", 8)
        yield opened


@pytest.fixture
def encoder(config: Config) -> Encoder:
    return Encoder.load(config.encoder)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many memories each call of an encoder encodes."""
    counts: list[int] = []
    whole = Encoder.encode_memories

    def counting(self: Encoder, pairs: Sequence[tuple[str, str]]) -> Any:
        counts.append(len(pairs))
        return whole(self, pairs)

    monkeypatch.setattr(Encoder, "encode_memories", counting)
    return counts


def test_todays_memories_are_published_under_the_encoder_that_serves(
    config: Config, store: PoolStore, encoder: Encoder, encoded: list[int]
) -> None:
    old = publish_now(store, config, encoder, metrics={"round": 7, "gate": {"passed": True}})
    (first,) = generations(config.retriever_dir)
    gone = next(store.iter("p"))
    new = fill(store, "p", ENOUGH + 1, seed=1)
    store.delete(gone.id)
    encoded.clear()
    assert refresh(store, config) == old + 1 == current(config.retriever_dir)
    assert sum(encoded) == len(new)  # the others' vectors are copied
    _, second = generations(config.retriever_dir)
    assert second.query_fingerprint == first.query_fingerprint
    assert second.positions == {"p": store.last_seq("p")}
    told = json.loads((config.retriever_dir / folder_name(old + 1) / "metrics.json").read_text())
    assert told["round"] == 7 and told["gate"] == {"passed": True}
    with load(config.retriever_dir) as generation:
        held = {id_.decode() for id_ in generation.ids["p"].tolist()}
    assert held == {memory.id for memory in store.iter("p")} and gone.id not in held
    assert refresh(store, config) is None  # nothing has come since


def test_of_one_encoders_generations_two_are_left_and_other_encoders_stay(
    config: Config, store: PoolStore, encoder: Encoder
) -> None:
    publish_now(store, config, Encoder.load(config.encoder.model_copy(update={"max_length": 7})))
    publish_now(store, config, encoder)
    left = {1: [1, 2, 3], 2: [1, 3, 4], 3: [1, 3, 4, 5], 4: [1, 5, 6]}
    for seed, present in left.items():
        fill(store, "p", ENOUGH + 1, seed=seed)
        reader = Lease(config.retriever_dir, 3) if seed == 3 else None
        refresh(store, config)
        assert numbers(config.retriever_dir) == present
        assert {first_with(config.retriever_dir, number) for number in present} == {1, 2}
        if reader is not None:
            reader.release()


def test_the_best_so_far_stays_the_best(config: Config, store: PoolStore, encoder: Encoder) -> None:
    other = Encoder.load(config.encoder.model_copy(update={"max_length": 7}))
    for best_is, expected in ((None, 3), (1, 1), (0, 0)):
        config = config.model_copy(update={"run": config.run.model_copy(
            update={"dir": config.run.dir.parent / f"run-{best_is}"})})  # fmt: skip
        publish_now(store, config, other)
        publish_now(store, config, encoder, best=best_is)
        fill(store, "p", ENOUGH + 1, seed=expected + 1)
        assert refresh(store, config) == 3
        assert best(config.retriever_dir) == expected


def test_the_best_is_there_after_a_publication_that_was_killed(
    config: Config, store: PoolStore, encoder: Encoder
) -> None:
    """Between its two renames: the newest generation, which says of itself that it's the best."""
    publish_now(store, config, encoder)
    for seed in (1, 2, 3):
        fill(store, "p", ENOUGH + 1, seed=seed)
        assert refresh(store, config) == seed + 1
        if seed == 1:
            (config.retriever_dir / "CURRENT").write_text("1\n")
        assert best(config.retriever_dir) in numbers(config.retriever_dir)


def test_nothing_is_published_where_little_has_come_or_an_operator_decides(
    config: Config, store: PoolStore, encoder: Encoder
) -> None:
    assert refresh(store, config) is None  # the configured encoder serves
    publish_now(store, config, encoder)
    fill(store, "p", ENOUGH, seed=1)
    assert refresh(store, config) is None
    fill(store, "p", 1, seed=2)
    activate(config.retriever_dir, 1)
    assert refresh(store, config) is None
    assert numbers(config.retriever_dir) == [1]


def test_a_restored_pool_hides_no_other(tmp_path: Path, store: PoolStore) -> None:
    """Its log ends before the index's position: all of it is read, and it is no credit."""
    config = make_config(tmp_path / "two", tiny_encoder(tmp_path / "encoder"), ("p", "q"))
    home = config.retriever_dir
    with open_store(config) as full:
        fill(full, "p", 3 * ENOUGH)
        publish_now(full, config, Encoder.load(config.encoder))
    restored = config.model_copy(update={"database_url": f"sqlite:///{tmp_path}/restored.db"})
    with open_store(restored) as opened:
        fill(opened, "p", 2)
        fill(opened, "q", ENOUGH - 2)
        assert refresh(opened, restored) is None
        fill(opened, "q", 1, seed=1)
        assert refresh(opened, restored) == 2 == current(home)


def test_a_failure_leaves_the_old_index(
    config: Config, store: PoolStore, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_now(store, config, encoder)
    fill(store, "p", ENOUGH + 1, seed=1)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("memshare.retrieval.publish.write_files", full)
        with pytest.raises(GenerationError, match="the disk is full"):
            refresh(store, config)
    weights = config.retriever_dir / folder_name(1) / "encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(GenerationError, match=r"model\.safetensors"):
        refresh(store, config)
    assert numbers(config.retriever_dir) == [1]


def test_an_index_that_cannot_be_deleted_is_told(
    config: Config,
    store: PoolStore,
    encoder: Encoder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def kept(*_: Any) -> bool:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(module, "discard", kept)
    publish_now(store, config, encoder)
    for seed in (1, 2):
        fill(store, "p", ENOUGH + 1, seed=seed)
        assert refresh(store, config) == seed + 1
    told = capsys.readouterr().err
    assert "published generation 3" in told and "could not be deleted" in told
    assert numbers(config.retriever_dir) == [1, 2, 3]
