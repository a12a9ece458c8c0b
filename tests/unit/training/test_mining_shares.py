"""Several processes that mine one round: the first plans, and nobody waits longer than for that."""

from __future__ import annotations

import asyncio
import shutil
import threading
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from memshare.config import Config
from memshare.records import NewMemory
from memshare.training.examples import read_examples, round_dir
from memshare.training.labels import Share
from tests.mining import ROOT, make_config, open_pool
from tests.training_runs import load_program

SECONDS = 60


@pytest.fixture
def program() -> ModuleType:
    return load_program(ROOT / "train" / "mine.py")


@pytest.fixture
def config(tmp_path: Path) -> Iterator[Config]:
    config = make_config(tmp_path, shard_rows=8)
    rows = [NewMemory("main", f"question {i} of {i * i}", f"answer {i % 5}") for i in range(60)]
    with open_pool(config, rows):
        yield config


def mine(program: ModuleType, config: Config, share: Share | None) -> dict[str, Any] | None:
    args = Namespace(round=1, iteration=1, proposer=None, share=share)
    with program.PoolStore.open(config.url) as store:
        marker: dict[str, Any] | None = asyncio.run(program.run(config, store, args, {}, {}))
        return marker


def test_nobody_waits_for_another_share_s_encoder_once_there_is_a_plan(
    program: ModuleType, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read from disk, verified and loaded, which takes a while, and each has GPUs idle."""
    assert mine(program, config, Share(0, 3)) is None  # it has planned
    blocked, go_on, opened = threading.Event(), threading.Event(), program.open_proposer

    def slow(*args: Any) -> AbstractContextManager[Any]:
        if not blocked.is_set():
            blocked.set()
            assert go_on.wait(SECONDS)
        return opened(*args)

    monkeypatch.setattr(program, "open_proposer", slow)
    with ThreadPoolExecutor(2) as threads:
        try:
            first = threads.submit(mine, program, config, Share(1, 3))
            assert blocked.wait(SECONDS)
            second = threads.submit(mine, program, config, Share(2, 3))
            assert second.result(SECONDS / 2) is None and not first.done()
        finally:
            go_on.set()
        marker = first.result(SECONDS)
    assert marker is not None and marker["examples"] > 16


def test_who_finds_a_plan_splits_no_pool_again(
    program: ModuleType, config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The plan's fates are on record: all shares go by one split, whatever has come since."""
    assert mine(program, config, Share(0, 2)) is None
    with program.PoolStore.open(config.url) as store:
        store.append([NewMemory("main", f"a later question {i}", "a") for i in range(20)])
    split = tmp_path / "split.json"
    before = split.read_bytes()
    shutil.copytree(tmp_path, tmp_path / "whole")
    split.unlink()
    assert mine(program, config, Share(1, 2)) is not None  # it is made again where it is gone
    found = list(read_examples(round_dir(config.examples_dir, 1)))
    whole = make_config(tmp_path / "whole", shard_rows=8)
    monkeypatch.setattr(program, "split_memories", lambda *_: pytest.fail("the pool was split"))
    assert mine(program, whole, Share(1, 2)) is not None
    assert list(read_examples(round_dir(whole.examples_dir, 1))) == found
    assert (tmp_path / "whole" / "split.json").read_bytes() == before
