"""Catching up before a swap: in small steps with rests, but never outrun by writers."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from memshare.config import Config
from memshare.pool.store import PoolStore
from memshare.retrieval.build import build_generation
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.publish import publish
from memshare.retrieval.searcher import Searcher
from memshare.retrieval.serving import frozen_serving
from tests.retrieving import (
    fill,
    publish_now,
    serves,
)  # fmt: skip


def late_memories(
    store: PoolStore, config: Config, searcher: Searcher, encoders: list[Encoder]
) -> Callable[[], None]:
    """One generation serves, and 100 memories are newer than the next, which the call publishes."""
    fill(store, "p", 4)
    publish_now(store, config, encoders[0])
    serves(searcher, 1)
    built = build_generation(store, config, encoders[1])
    fill(store, "p", 100, seed=1)
    searcher.wait_visible("p", store.last_seq("p"), 60)
    return lambda: publish(
        config.retriever_dir, encoder=encoders[1], parent=None, metrics={}, keep=9,
        **built.parts(),
    )  # fmt: skip


def watch_catching_up(
    monkeypatch: pytest.MonkeyPatch, then: Callable[[int], None]
) -> list[tuple[float, float, int]]:
    """Begin, end and memories of what the loader encodes from now on; ``then`` is told how many."""
    spans: list[tuple[float, float, int]] = []
    encode = Encoder.encode_memories

    def watched(self: Encoder, pairs: list[tuple[str, str]]) -> Any:
        began = time.perf_counter()
        vectors = encode(self, pairs)
        if threading.current_thread().name == "searcher-loader":
            time.sleep(0.02)
            spans.append((began, time.perf_counter(), len(pairs)))
            then(len(pairs))
        return vectors

    monkeypatch.setattr(Encoder, "encode_memories", watched)
    return spans


def test_catching_up_rests_while_another_generation_serves(
    store: PoolStore, config: Config, searcher: Searcher, encoders: list[Encoder],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    publish_next = late_memories(store, config, searcher, encoders)
    spans = watch_catching_up(monkeypatch, lambda count: None)
    publish_next()
    serves(searcher, 2)
    assert len(spans) >= 6 and max(count for _, _, count in spans) <= 16
    for (began, end, _), (after, _, _) in itertools.pairwise(spans):
        assert after - end >= 3 * (end - began)


def test_catching_up_does_not_rest_where_writers_are_faster(
    store: PoolStore, config: Config, searcher: Searcher, encoders: list[Encoder],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    publish_next = late_memories(store, config, searcher, encoders)
    seeds = itertools.count(2)

    def write_as_many(count: int) -> None:
        if count <= 16:
            fill(store, "p", count, seed=next(seeds))

    spans = watch_catching_up(monkeypatch, write_as_many)
    publish_next()
    serves(searcher, 2)
    # As many came in the first round as it had taken in: the second had all of those at once.
    assert max(count for _, _, count in spans) >= 100 and len(spans) < 20


def test_the_log_tells_how_far_a_long_way_is(
    store: PoolStore,
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("memshare.progress._LINE_EVERY_SECONDS", 0.0)
    monkeypatch.setattr("memshare.retrieval.serving.PAGE", 10)
    monkeypatch.setattr("memshare.retrieval.serving.MAX_DELTA", 15)
    serving = frozen_serving(config)
    fill(store, "p", 16)
    serving.catch_up(store)
    told = capsys.readouterr().err
    assert "p lacks, by 10 changes: 1/2" in told and "2/2" in told
    fill(store, "p", 15, seed=1)
    serving.catch_up(store)
    assert "lacks" not in capsys.readouterr().err
    assert serving.behind(store) == {}
