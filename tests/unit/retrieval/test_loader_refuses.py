"""The loader and what it can't serve: damaged generations, and those of other pools or encoders."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from memshare.config import Config
from memshare.pool.store import PoolStore
from memshare.retrieval import loader as loader_module
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.publish import activate
from memshare.retrieval.searcher import Searcher
from tests.retrieving import (
    fill,
    find,
    open_store,
    publish_now,
    serves,
    until,
)  # fmt: skip
from tests.swapping import Expected, mixed


def test_a_damaged_generation_is_refused_once_and_the_old_one_serves_on(
    store: PoolStore, config: Config, searcher: Searcher, encoders: list[Encoder],
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    memory = fill(store, "p", 5)[0]
    publish_now(store, config, encoders[0])
    serves(searcher, 1)
    home = config.retriever_dir
    publish_now(store, config, encoders[1], keep=9)
    serves(searcher, 2)
    activate(config.retriever_dir, 1)
    serves(searcher, 1)
    weights = home / "000002" / "encoder" / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1])
    tries: list[object] = []
    real = loader_module.load
    monkeypatch.setattr(loader_module, "load", lambda *a: (tries.append(a), real(*a))[1])
    (home / "CURRENT").write_text("2\n")
    until(lambda: searcher.stats().generation_error is not None)
    time.sleep(0.3)  # many polls
    assert find(searcher, memory) and searcher.stats().generation == 1
    assert "model.safetensors" in str(searcher.stats().generation_error)
    assert len(tries) == capsys.readouterr().err.count("serves on") == 1
    weights.write_bytes(data)
    activate(config.retriever_dir, 2)  # CURRENT written again: another try
    serves(searcher, 2)
    until(lambda: searcher.stats().generation_error is None)
    assert len(tries) == 2


def test_start_with_a_damaged_current(
    store: PoolStore, config: Config, encoders: list[Encoder]
) -> None:
    memory = fill(store, "p", 5)[0]
    publish_now(store, config, encoders[0])
    publish_now(store, config, encoders[1])
    (config.retriever_dir / "000002" / "ids.npy").unlink()
    with Searcher(store, config) as searcher:
        searcher.wait_ready(60)
        assert searcher.search("p", "x", 9).generation == 1
        assert "ids.npy" in str(searcher.stats().generation_error)
    (config.retriever_dir / "000001" / "ids.npy").unlink()
    with Searcher(store, config) as searcher:
        searcher.wait_ready(60)
        assert searcher.stats().generation == 0 and memory.id in find(searcher, memory)


def test_another_database_than_the_one_it_was_built_from(
    store: PoolStore, config: Config, encoders: list[Encoder], tmp_path: Path
) -> None:
    fill(store, "p", 20)
    publish_now(store, config, encoders[0])
    other = config.model_copy(update={"database_url": f"sqlite:///{tmp_path}/other.db"})
    with open_store(other) as fresh, Searcher(fresh, other) as searcher:
        memories = fill(fresh, "p", 3, seed=7)
        searcher.wait_visible("p", memories[-1].seq, 60)
        assert set(find(searcher, memories[0])) == {memory.id for memory in memories}


def test_a_pool_whose_generation_was_built_by_another_encoder(
    store: PoolStore, config: Config, encoders: list[Encoder]
) -> None:
    """The configuration names encoder 0; the generation's own, encoder 1, answers and fills up."""
    fill(store, "p", 5)
    publish_now(store, config, encoders[1])
    late = fill(store, "p", 5, seed=1)
    with Searcher(store, config) as searcher:
        searcher.wait_visible("p", late[-1].seq, 60)
        answer = searcher.search("p", "river stone", 10)
    triples = [(m.id, m.prompt, m.answer) for m in store.iter("p")]
    assert mixed(answer, 0, {1: Expected.of(encoders[1], ["river stone"], triples)}, 10) is None
