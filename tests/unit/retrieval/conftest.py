"""A searcher over an empty store, and two tiny encoders that it may serve."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from memshare.config import Config
from memshare.pool.store import PoolStore
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.searcher import Searcher
from tests.retrieving import make_config, open_store
from tests.tiny import tiny_encoder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    base = tmp_path_factory.mktemp("encoders")
    return [tiny_encoder(base / str(seed), seed=seed) for seed in range(2)]


@pytest.fixture
def encoders(folders: list[Path]) -> list[Encoder]:
    return [Encoder.from_folder(folder, device="cpu") for folder in folders]


@pytest.fixture
def config(tmp_path: Path, folders: list[Path]) -> Config:
    return make_config(tmp_path / "run", folders[0], ("p", "q"))


@pytest.fixture
def store(config: Config) -> Iterator[PoolStore]:
    with open_store(config) as opened:
        yield opened


@pytest.fixture
def searcher(store: PoolStore, config: Config) -> Iterator[Searcher]:
    with Searcher(store, config) as started:
        yield started
