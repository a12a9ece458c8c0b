"""Encoding by several processes, here threads with an encoder each: the rows of one process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from memshare.config import Config
from memshare.pool.store import PoolStore
from memshare.retrieval import build
from memshare.retrieval.build import Built, build_generation
from memshare.retrieval.divided import dismiss, engage, serve
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.errors import EncoderError
from tests.retrieving import fill, make_config, open_store, publish_now

T = TypeVar("T")


class Group:
    """What the peers share; ``calls`` counts what each collective was used for."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=20)
        self.values: list[Any] = [None] * size
        self.told: Any = None
        self.rounds = 0


class Peer:
    """One of them: a `memshare.retrieval.divided.Peers`."""

    def __init__(self, group: Group, rank: int) -> None:
        self.group, self.rank, self.size = group, rank, group.size

    def from_main(self, value: T) -> T:
        if self.rank == 0:
            self.group.told = value
        self.group.barrier.wait()
        told: T = self.group.told
        self.group.barrier.wait()
        return told

    def to_main(self, value: T) -> list[T]:
        self.group.values[self.rank] = value
        self.group.barrier.wait()
        values = list(self.group.values) if self.rank == 0 else []
        self.group.rounds += self.rank == 0
        self.group.barrier.wait()
        return values


@pytest.fixture
def config(tmp_path: Path, folders: list[Path]) -> Config:
    return make_config(tmp_path / "run", folders[0], pools=("p", "empty", "q"))


@pytest.fixture
def store(config: Config) -> Iterator[PoolStore]:
    """A pool with holes: deleted memories at its beginning, held ones in between."""
    with open_store(config) as opened:
        made = fill(opened, "p", 40)
        for memory in made[:9]:
            opened.delete(memory.id)
        for memory in made[12:30:5]:
            opened.hold(memory.id)
        fill(opened, "q", 3)
        yield opened


def together(store: PoolStore, config: Config, folders: list[Path]) -> tuple[Built, Group]:
    """One build by as many peers as there are ``folders``, the first one's being the main one."""
    group = Group(len(folders))
    peers = [Peer(group, rank) for rank in range(len(folders))]
    models = [Encoder.from_folder(folder, device="cpu") for folder in folders]
    with ThreadPoolExecutor(len(folders)) as threads:
        others = [
            threads.submit(serve, store, model, peer)
            for model, peer in zip(models[1:], peers[1:], strict=True)
        ]
        for other in others:  # an error of theirs is not to leave the main one waiting
            other.add_done_callback(lambda f: group.barrier.abort() if f.exception() else None)
        main = threads.submit(build_generation, store, config, models[0], peers[0])
        for other in others:
            other.result(30)
        return main.result(30), group


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_build_what_one_builds(
    store: PoolStore, config: Config, folders: list[Path], processes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(build, "_BLOCK", 4)
    alone = build_generation(store, config, Encoder.from_folder(folders[0], device="cpu"))
    built, group = together(store, config, [folders[0]] * processes)
    assert (built.ids, built.spans, built.positions) == (alone.ids, alone.spans, alone.positions)
    assert built.built_by == alone.built_by
    assert len(built.ids) == 40 - 9 - 4 + 3
    np.testing.assert_allclose(built.vectors, alone.vectors, atol=1e-6, rtol=0)
    assert group.rounds >= 3


def test_nothing_counts_a_pool_that_is_encoded(
    store: PoolStore, config: Config, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That takes as long as the pool is large, and a database ends a query that takes long."""
    monkeypatch.setattr(PoolStore, "stats", lambda *_: pytest.fail("the pool was counted"))
    alone = build_generation(store, config, Encoder.from_folder(folders[0], device="cpu"))
    built, _ = together(store, config, [folders[0]] * 2)
    assert built.ids == alone.ids


def test_small_pools_are_divided_too(store: PoolStore, config: Config, folders: list[Path]) -> None:
    """One round for each pool that has memories, though they would all fit in one block."""
    _, group = together(store, config, [folders[0]] * 2)
    assert group.rounds == 2


def test_a_pool_whose_memories_were_all_deleted_is_not_divided(
    store: PoolStore, config: Config, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL refuses to find the end of a span of no memories."""
    monkeypatch.setattr(PoolStore, "span_end", lambda *_: pytest.fail("nothing to divide"))
    for pool in ("p", "q"):
        for memory in list(store.iter(pool, include_held=True)):
            store.delete(memory.id)
    built, group = together(store, config, [folders[0]] * 2)
    assert group.rounds == 0 and not built.ids


def test_nobody_helps_where_vectors_are_copied(
    store: PoolStore, config: Config, folders: list[Path]
) -> None:
    publish_now(store, config, Encoder.from_folder(folders[0], device="cpu"))
    fill(store, "q", 2, seed=1)
    built, group = together(store, config, [folders[0]] * 2)
    assert group.rounds == 0 and len(built.ids) == 32
    again = build_generation(store, config, Encoder.from_folder(folders[0], device="cpu"))
    assert np.array_equal(built.vectors, again.vectors)


def test_another_encoder_is_refused(store: PoolStore, config: Config, folders: list[Path]) -> None:
    with pytest.raises(EncoderError, match="process 1 has another encoder"):
        together(store, config, folders)


def test_who_is_not_needed_is_told(store: PoolStore, folders: list[Path]) -> None:
    group = Group(2)
    encoder = Encoder.from_folder(folders[0], device="cpu")
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(serve, store, encoder, Peer(group, 1))
        engage(Peer(group, 0), None)
        other.result(20)
        other = threads.submit(serve, store, encoder, Peer(group, 1))
        engage(Peer(group, 0), encoder.memory_fingerprint())
        dismiss(Peer(group, 0))
        other.result(20)
