"""IVF and HNSW: what they find against exact search, and that no filter starves them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memshare.config import IndexConfig
from memshare.records import Memory
from memshare.retrieval.approximate import ApproximateIndex, build_index, recall_at_10, wrap
from memshare.retrieval.delta import Shard
from memshare.retrieval.filters import Filter, terms_of
from memshare.retrieval.index import FlatIndex, IndexFault
from memshare.retrieval.index_file import read_indexes, write_indexes

KINDS = ["flat", "ivf", "hnsw"]
APPROXIMATE = KINDS[1:]


def clustered(n: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    """Unit vectors around a hundred centres."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(100, dim))
    raw = centres[rng.integers(0, 100, n)] + 0.5 * rng.normal(size=(n, dim))
    return np.asarray(raw / np.linalg.norm(raw, axis=1, keepdims=True), dtype=np.float32)


def settings(kind: str, **more: object) -> IndexConfig:
    small = {"approximate_from": 500, "links": 8, "ef_construction": 32, "ef_search": 48}
    return IndexConfig.model_validate({"kind": kind, "nprobe": 24, **small, **more})


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_similarities_are_exact_and_most_of_the_best_are_found(
    kind: str, precision: str, tmp_path: Path
) -> None:
    vectors, queries = clustered(3000), clustered(50, seed=1)
    made = build_index(vectors, settings(kind, precision=precision))
    write_indexes(tmp_path / "index.faiss", [made])
    (index,) = read_indexes(tmp_path / "index.faiss", [3000])
    kept = index.reconstruct(np.arange(3000))
    assert index.kind == kind and len(index) == 3000
    np.testing.assert_allclose(kept, vectors, atol=5e-4 if precision == "float16" else 0)
    products = (queries.astype(np.float64) @ kept.astype(np.float64).T).astype(np.float32)
    similarities, rows = index.search(queries, 10)
    np.testing.assert_allclose(similarities, np.take_along_axis(products, rows, 1), atol=1e-7)
    assert (np.diff(similarities, axis=1) <= 0).all()
    best = -np.sort(-products, axis=1)[:, 9:10]
    found = float((similarities >= best).mean())
    assert found == 1.0 if kind == "flat" else found > 0.9
    again = made.search(queries, 10)
    np.testing.assert_array_equal(again[1], rows)


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_small_pools_stay_flat(kind: str) -> None:
    assert build_index(clustered(499), settings(kind)).kind == "flat"
    assert build_index(clustered(500), settings(kind)).kind == kind
    assert len(build_index(np.empty((0, 4), np.float32), settings(kind, precision="float16"))) == 0


@pytest.mark.parametrize("kind", APPROXIMATE)
@pytest.mark.parametrize("share", [0.001, 0.02, 0.3, 0.7, 0.99])
def test_a_mask_is_obeyed_and_never_starves(kind: str, share: float) -> None:
    vectors, queries = clustered(12_000), clustered(8, seed=2)
    index = build_index(vectors, settings(kind))
    allowed = np.random.default_rng(3).random(12_000) < share
    count = int(allowed.sum())
    exact = FlatIndex.build(vectors).search(queries, 20, allowed)
    similarities, rows = index.search(queries, 20, allowed)
    assert count >= 1
    for found in rows:
        found = found[found >= 0]
        assert len(set(found.tolist())) == min(20, count) and allowed[found].all()
    recall = float((similarities >= exact[0][:, min(20, count) - 1 :][:, :1]).mean())
    assert recall > 0.85 * min(20, count) / 20


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_a_filter_against_the_clusters_does_not_starve(kind: str) -> None:
    """What passes is all far from the query: no list near it, no path to it."""
    near = np.zeros((9000, 8), np.float32)
    near[:, 0] = 1
    far = np.zeros((5000, 8), np.float32)
    far[:, 1] = 1
    noise = 0.01 * np.random.default_rng(0).normal(size=(14_000, 8)).astype(np.float32)
    index = build_index(np.concatenate([near, far]) + noise, settings(kind, nprobe=1))
    allowed = np.arange(14_000) >= 9000
    _, rows = index.search(near[:2], 100, allowed)
    assert (rows >= 9000).all()
    assert all(len(set(found.tolist())) == 100 for found in rows)
    _, rows = index.search(near[:1], 14_000)  # more than any list or walk holds
    assert sorted(rows[0].tolist()) == list(range(14_000))


def test_recall_is_measured_against_exact_search() -> None:
    vectors = np.random.default_rng(4).normal(size=(5000, 16)).astype(np.float32)  # no clusters
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert recall_at_10(build_index(vectors, settings("flat"))) == 1.0
    poor = recall_at_10(build_index(vectors, settings("ivf", nprobe=1, nlist=100)))
    good = recall_at_10(build_index(vectors, settings("ivf", nprobe=40, nlist=100)))
    assert 0.1 < poor < 0.9 < good
    copies = np.repeat(clustered(50), 20, axis=0)  # twenty of each: any ten of them will do
    assert recall_at_10(build_index(copies, settings("ivf", nprobe=20, nlist=20))) == 1.0


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_rows_are_added(kind: str) -> None:
    vectors = clustered(2000, seed=5)
    index = build_index(vectors[:1500], settings(kind))
    index.add(vectors[1500:])
    assert isinstance(index, ApproximateIndex) and len(index) == 2000
    np.testing.assert_array_equal(index.reconstruct(np.arange(2000)), vectors)
    _, rows = index.search(vectors[1900:1910], 1)
    assert rows[:, 0].tolist() == list(range(1900, 1910))


def test_other_indexes_are_refused() -> None:
    import faiss

    for other in (faiss.IndexFlatL2(4), faiss.IndexLSH(4, 8), faiss.IndexPQ(4, 2, 8)):
        with pytest.raises(IndexFault, match="expected an inner-product index"):
            wrap(other)
    bad = clustered(600)
    bad[7, 3] = np.nan
    for kind in KINDS:
        with pytest.raises(IndexFault, match="row 7 holds NaN"):
            build_index(bad, settings(kind))


COUNT = 100_000
MINE = set(np.random.default_rng(7).choice(COUNT, COUNT // 100, replace=False).tolist())
TIMES = ["2026-01-01T00:00:00.000000Z", "2026-02-01T00:00:00.000000Z"]


@pytest.fixture(scope="module")
def memories() -> list[Memory]:
    """A hundredth by ann about a rare topic, spread over the pool."""
    return [
        Memory(
            f"m{i:06d}", "p", "q", "a", None, "ann" if i in MINE else "bob", None, TIMES[i % 2],
            {"topic": "rare" if i in MINE else "common"}, i + 1,
        )
        for i in range(COUNT)
    ]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_one_percent_of_a_hundred_thousand_memories(kind: str, memories: list[Memory]) -> None:
    """A principal with 1 % of the pool gets its full k, by every filter, tombstones and all."""
    k = 50
    small = {"nlist": 64, "links": 4, "ef_construction": 8, "ef_search": 16}
    index = build_index(clustered(COUNT, dim=8, seed=6), settings(kind, **small))
    assert index.kind == kind
    shard = Shard(8, index, np.array([m.id.encode() for m in memories]), COUNT)
    shard.load_columns(memories)
    gone = np.random.default_rng(9).choice(sorted(MINE), 100, replace=False).tolist()
    shard.reconcile({f"m{i:06d}": None for i in gone})
    left = {f"m{i:06d}" for i in MINE} - {f"m{i:06d}" for i in gone}
    early = {id for id in left if int(id[1:]) % 2 == 0}
    queries = clustered(3, dim=8, seed=8)
    for restrict, living in (
        (Filter(agent="ann"), left),
        (Filter(terms=terms_of({"topic": "rare"})), left),
        (Filter("ann", created_before=TIMES[1], terms=terms_of({"topic": "rare"})), early),
    ):
        for hits in shard.top(queries, k, restrict):
            ids = {hit.id for hit in hits}
            assert len(ids) == k and ids <= living
        (every,) = shard.top(queries[:1], len(living) + 10, restrict)
        assert {hit.id for hit in every} == living
