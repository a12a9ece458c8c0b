"""A shard against brute force: filters, deletions, holds, index and delta in any mixture."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memshare.config import IndexConfig
from memshare.records import Hit, Memory
from memshare.retrieval.approximate import build_index
from memshare.retrieval.columns import Growing
from memshare.retrieval.delta import Shard
from memshare.retrieval.filters import Filter, microseconds, terms_of
from memshare.retrieval.index import FlatIndex

DIM = 4


def vectors_of(count: int, seed: int) -> np.ndarray:
    """Few distinct directions, so that ties are common."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(-2, 3, (count, DIM)).astype(np.float32)
    raw[np.abs(raw).sum(axis=1) == 0] = 1.0
    return raw / np.linalg.norm(raw, axis=1, keepdims=True)


def memory(i: int, agent: str | None = None, held: bool = False) -> Memory:
    day = f"2026-01-{1 + i % 28:02d}T00:00:00.000000Z"
    return Memory(f"m{i:05d}", "p", "q", "a", None, agent, None, day, {}, i + 1, held)


class Model:
    """The same by brute force: every row in a list."""

    def __init__(self) -> None:
        self.rows: list[tuple[Memory, np.ndarray]] = []
        self.gone: set[str] = set()

    def top(self, query: np.ndarray, k: int, restrict: Filter | None) -> list[tuple[str, float]]:
        scored = []
        for age, (item, vector) in enumerate(self.rows):
            if item.id in self.gone or (restrict is not None and not _passes(item, restrict)):
                continue
            product = np.float32(vector.astype(np.float64) @ query.astype(np.float64))
            scored.append((-float(product), age, item.id))
        if restrict is not None and restrict.max_per_agent is not None:
            scored = self._spread(sorted(scored), restrict.max_per_agent)
        return [(id, -negative) for negative, _, id in sorted(scored)[:k]]

    def _spread(
        self, ranked: list[tuple[float, int, str]], most: int
    ) -> list[tuple[float, int, str]]:
        """Without what comes after the first ``most`` of its agent."""
        seen: Counter[str | None] = Counter()
        kept = []
        for row in ranked:
            agent = self.rows[row[1]][0].agent
            seen[agent] += 1
            if agent is None or seen[agent] <= most:
                kept.append(row)
        return kept


def _passes(item: Memory, restrict: Filter) -> bool:
    return (
        (restrict.agent is None or item.agent == restrict.agent)
        and (restrict.created_after is None or item.created_at >= restrict.created_after)
        and (restrict.created_before is None or item.created_at < restrict.created_before)
        and item.id not in restrict.exclude
    )


def make(base: int, extra: int, seed: int) -> tuple[Shard, Model]:
    model = Model()
    vectors = vectors_of(base + extra, seed)
    agents = [["ann", "bob", None][i % 3] for i in range(base + extra)]
    model.rows = [(memory(i, agents[i]), vectors[i]) for i in range(base + extra)]
    items = [item for item, _ in model.rows]
    ids = np.array([item.id.encode() for item in items[:base]] or [b""], np.bytes_)[:base]
    shard = Shard(DIM, FlatIndex.build(vectors[:base]), ids, base)
    shard.load_columns(items[:base])
    new = shard.reconcile({item.id: item for item in items})
    assert new == items[base:]
    shard.add(new, vectors[base:])
    return shard, model


def same(found: tuple[Hit, ...], expected: list[tuple[str, float]]) -> None:
    assert [hit.id for hit in found] == [id for id, _ in expected]
    assert np.allclose([h.similarity for h in found], [s for _, s in expected], atol=1e-6)


DAYS = st.none() | st.integers(1, 28).map(lambda day: f"2026-01-{day:02d}T00:00:00.000000Z")


@settings(deadline=None, max_examples=150)
@given(
    base=st.integers(0, 120),
    extra=st.integers(0, 60),
    seed=st.integers(0, 10_000),
    share=st.sampled_from([0.0, 0.05, 0.5, 0.95, 1.0]),
    k=st.integers(1, 200),
    agent=st.sampled_from([None, "ann", "bob", "nobody"]),
    after=DAYS,
    before=DAYS,
    freeze=st.booleans(),
    most=st.none() | st.integers(1, 8),
)
def test_k_are_found_if_k_exist(
    base: int, extra: int, seed: int, share: float, k: int, agent: str | None,
    after: str | None, before: str | None, freeze: bool, most: int | None,
) -> None:  # fmt: skip
    shard, model = make(base, extra, seed)
    rng = np.random.default_rng(seed)
    model.gone = {item.id for item, _ in model.rows if rng.random() < share}
    shard.reconcile(dict.fromkeys(model.gone))
    excluded = frozenset(item.id for item, _ in model.rows if rng.random() < 0.1)
    if freeze:
        shard.freeze(None)
        assert shard.delta_rows == 0
    queries = vectors_of(3, seed + 1)
    for restrict in (None, Filter(agent, after, before, excluded, max_per_agent=most)):
        for query, found in zip(queries, shard.top(queries, k, restrict), strict=True):
            same(found, model.top(query, k, restrict))


def test_the_best_rows_are_all_deleted() -> None:
    """Far more deleted rows stand before the first living one than are searched past at first."""
    count = 3000
    vectors = np.tile(np.array([1, 0, 0, 0], np.float32), (count, 1))
    vectors[1000:] = [0, 1, 0, 0]
    items = [memory(i) for i in range(count)]
    shard = Shard(DIM, FlatIndex.build(vectors), np.array([m.id.encode() for m in items]), count)
    shard.load_columns(items)
    shard.reconcile({item.id: None for item in items[:1000]})
    found = shard.top(vectors[:1], 7)[0]
    assert [hit.id for hit in found] == [item.id for item in items[1000:1007]]


def test_hold_release_and_delete() -> None:
    shard, _ = make(3, 3, 0)
    for i in (1, 4):  # a row of the index, and one of the delta
        shard.reconcile({f"m{i:05d}": memory(i, held=True)})
        assert f"m{i:05d}" not in [hit.id for hit in shard.top(vectors_of(1, 1), 9)[0]]
        assert shard.reconcile({f"m{i:05d}": memory(i)}) == []
        assert f"m{i:05d}" in [hit.id for hit in shard.top(vectors_of(1, 1), 9)[0]]
    shard.reconcile({"m00001": None, "m00004": None, "never-seen": None})
    assert shard.visible == 4 and shard.rows == 6


def test_many_releases_look_through_the_metadata_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is as long as the pool, and every search waits meanwhile."""
    looks: Counter[int] = Counter()
    whole = Growing.view.fget
    assert whole is not None

    def counted(growing: Growing) -> Any:
        looks[id(growing)] += 1
        return whole(growing)

    monkeypatch.setattr(Growing, "view", property(counted))
    seen = []
    for count in (1, 40):
        shard, _ = make(50, 0, 0)
        terms = id(shard._columns._term_rows)
        looks.clear()
        told = [replace(memory(i), metadata={"n": i, "all": True}) for i in range(count)]
        shard.reconcile({item.id: item for item in told})
        shard.reconcile({item.id: item for item in told})  # nothing new
        seen.append(looks[terms])
        hits = shard.top(vectors_of(1, 1), 99, Filter(terms=terms_of({"all": True})))[0]
        assert {hit.id for hit in hits} == {item.id for item in told}
        assert len(shard._columns._terms.view) == 2 * count
    assert seen[0] == seen[1]


def test_a_held_memory_gets_its_row_on_release() -> None:
    shard = Shard(DIM)
    assert shard.reconcile({"m00000": memory(0, held=True)}) == []
    assert shard.reconcile({"m00000": memory(0)}) == [memory(0)]


def test_rows_that_the_pool_lacks_are_masked() -> None:
    """A memory deleted between the build and the load must not come back."""
    items = [memory(i) for i in range(4)]
    shard = Shard(DIM, FlatIndex.build(vectors_of(4, 0)), np.array([m.id.encode() for m in items]))
    shard.load_columns([items[0], replace(items[2], held=True), memory(77)])
    assert [hit.id for hit in shard.top(vectors_of(1, 1), 9)[0]] == ["m00000"]


@settings(deadline=None, max_examples=60)
@given(
    base=st.integers(0, 40),
    extra=st.integers(0, 20),
    newer=st.integers(0, 10),
    drop=st.integers(0, 10),
    seed=st.integers(0, 10_000),
)
def test_the_next_generation_takes_over_what_the_old_one_knew(
    base: int, extra: int, newer: int, drop: int, seed: int
) -> None:
    """Its rows: other ones, in another order; what the old one lacks is read and told."""
    old, model = make(base, extra, seed)
    rng = np.random.default_rng(seed)
    gone = {item.id for item, _ in model.rows if rng.random() < 0.2}
    old.reconcile(dict.fromkeys(gone))
    old.position = 50
    count = base + extra + newer
    agents = [["ann", "bob", None][i % 3] for i in range(count)]
    items = [memory(i, agents[i]) for i in range(count)]
    order = rng.permutation(count)[drop:]
    vectors = vectors_of(count, seed + 1)
    ids = np.array([items[i].id.encode() for i in order] or [b""], np.bytes_)[: len(order)]
    shard = Shard(DIM, FlatIndex.build(vectors[order].reshape(-1, DIM)), ids, 60)
    lacked = shard.adopt(old.snapshot())
    assert set(lacked) == {items[i].id for i in order if i >= base + extra}
    shard.load_columns(items[int(id[1:])] for id in lacked)
    assert shard.position == 50
    expected = Model()
    expected.rows = [(items[i], vectors[i]) for i in order]
    expected.gone = gone
    for restrict in (None, Filter("bob"), Filter(created_after="2026-01-05")):
        for query, found in zip(
            vectors_of(2, seed + 2), shard.top(vectors_of(2, seed + 2), 99, restrict), strict=True
        ):
            same(found, expected.top(query, 99, restrict))


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_a_large_delta_joins_an_approximate_index(kind: str) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(3000, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    items = [memory(i) for i in range(3000)]
    chosen = IndexConfig.model_validate({"kind": kind, "approximate_from": 1000, "nprobe": 500})
    ids = np.array([item.id.encode() for item in items[:2000]])
    shard = Shard(16, build_index(vectors[:2000], chosen), ids, 2000)
    shard.load_columns(items[:2000])
    shard.add(items[2000:], vectors[2000:])
    before = shard.top(vectors[2500:2510], 5)
    shard.freeze(None)
    assert shard.delta_rows == 0 and shard.rows == 3000
    found = shard.top(vectors[2500:2510], 5)
    assert [hits[0].id for hits in found] == [item.id for item in items[2500:2510]]
    if kind == "ivf":  # every list is probed, so nothing is missed
        assert found == before


def test_an_empty_shard_finds_nothing() -> None:
    assert Shard(DIM).top(vectors_of(2, 0), 3) == [(), ()]
    assert Shard(DIM).top(vectors_of(2, 0), 3, Filter(agent="ann")) == [(), ()]


def test_ids_of_different_lengths() -> None:
    ids = ["b", "a", "abc", "ab"]
    shard = Shard(DIM, FlatIndex.build(vectors_of(4, 0)), np.array([i.encode() for i in ids]))
    shard.load_columns([replace(memory(0), id=id) for id in ("a", "abc", "abcd", "abb")])
    assert {hit.id for hit in shard.top(vectors_of(1, 1), 9)[0]} == {"a", "abc"}


def test_times() -> None:
    assert microseconds("1970-01-02") == 86_400_000_000
    assert microseconds("2026-01-01T01:00:00+01:00") == microseconds("2026-01-01T00:00:00Z")
    with pytest.raises(ValueError, match="created_after: 'soon'"):
        Filter(created_after="soon")


@given(st.lists(st.integers(0, 50), max_size=12))
def test_growing(sizes: list[int]) -> None:
    grown, expected = Growing(np.float32), np.empty(0, np.float32)
    for i, size in enumerate(sizes):
        part = np.full(size, i, np.float32)
        grown.extend(part)
        expected = np.concatenate([expected, part])
        assert np.array_equal(grown.view, expected)
