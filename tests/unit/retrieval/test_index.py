from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memshare.retrieval import gpu
from memshare.retrieval import index as index_module
from memshare.retrieval.gpu import GpuFault, gpu_place
from memshare.retrieval.index import FlatIndex, IndexFault
from memshare.retrieval.index_file import read_indexes, write_indexes


def unit(n: int, dim: int = 24, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


def brute(
    vectors: np.ndarray, queries: np.ndarray, k: int, rows: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Every product in float64, rounded to float32, sorted by (similarity desc, row asc)."""
    allowed = np.arange(len(vectors)) if rows is None else np.unique(rows)
    exact = (queries.astype(np.float64) @ vectors[allowed].astype(np.float64).T).astype(np.float32)
    sims = np.full((len(queries), k), -np.inf, dtype=np.float32)
    found = np.full((len(queries), k), -1, dtype=np.int64)
    for i, row in enumerate(exact):
        order = np.lexsort((allowed, -row))[:k]
        sims[i, : len(order)], found[i, : len(order)] = row[order], allowed[order]
    return sims, found


@pytest.mark.parametrize("k", [1, 10, 300])
def test_equals_brute_force_for_any_batch_size(k: int) -> None:
    vectors, queries = unit(200), unit(40, seed=1)
    index = FlatIndex.build(vectors)
    sims, rows = brute(vectors, queries, k)
    found_sims, found_rows = index.search(queries, k)
    np.testing.assert_array_equal(found_rows, rows)
    np.testing.assert_allclose(found_sims, sims, atol=1e-7)
    assert found_sims.dtype == np.float32
    assert found_rows.dtype == np.int64
    for i in (0, 17):  # FAISS multiplies small and large batches differently
        one_sims, one_rows = index.search(queries[i : i + 1], k)
        np.testing.assert_array_equal(one_rows[0], found_rows[i])
        np.testing.assert_array_equal(one_sims[0], found_sims[i])


def test_equal_vectors_come_in_row_order_even_across_the_edge() -> None:
    vectors = unit(500, dim=96)
    copies = np.arange(3, 403, 4)  # a hundred equal rows, far more than what is over-fetched
    vectors[copies] = vectors[3]
    index = FlatIndex.build(vectors)
    queries = np.concatenate([vectors[3:4], unit(30, dim=96, seed=2)])
    sims, rows = index.search(queries, 10)
    np.testing.assert_array_equal(rows[0], copies[:10])
    np.testing.assert_array_equal(sims[0], sims[0, 0])
    np.testing.assert_array_equal(rows, brute(vectors, queries, 10)[1])


@pytest.mark.parametrize("queries", [1, 40])
def test_rounding_in_faiss_hides_no_better_row(queries: int) -> None:
    """Hundreds of rows closer to each other than float32 products are exact."""
    rng = np.random.default_rng(7)
    vectors = np.repeat(unit(1, dim=384), 400, axis=0)
    vectors += (1e-7 * rng.normal(size=vectors.shape)).astype(np.float32)
    asked = np.repeat(unit(1, dim=384), queries, axis=0) + 0.01 * unit(queries, dim=384, seed=8)
    found, expected = FlatIndex.build(vectors).search(asked, 10), brute(vectors, asked, 10)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(0, 60),
    distinct=st.integers(1, 6),
    k=st.integers(1, 40),
)
def test_pools_full_of_copies(seed: int, n: int, distinct: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = unit(distinct, dim=8, seed=seed)[rng.integers(0, distinct, n)].reshape(n, 8)
    queries = unit(3, dim=8, seed=seed + 1)
    index = FlatIndex.build(vectors)
    sims, rows = index.search(queries, k)
    expected_sims, expected_rows = brute(vectors, queries, k)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(sims, expected_sims, atol=1e-7)
    subset = rng.integers(0, n, min(n, 10)) if n else np.empty(0, dtype=np.int64)
    np.testing.assert_array_equal(
        index.search_rows(queries, subset, k)[1], brute(vectors, queries, k, subset)[1]
    )


def test_search_rows_is_search_among_them() -> None:
    vectors, queries = unit(300), unit(7, seed=3)
    index = FlatIndex.build(vectors)
    rows = np.array([250, 3, 3, 99, 17, 42])
    sims, found = index.search_rows(queries, rows, 4)
    np.testing.assert_array_equal(found, brute(vectors, queries, 4, rows)[1])
    full_sims, full = index.search(queries, 300)
    for i in range(7):
        lookup = dict(zip(full[i], full_sims[i], strict=True))
        assert [lookup[row] for row in found[i]] == list(sims[i])
    sims, found = index.search_rows(queries, rows, 9)
    assert (found[:, 5:] == -1).all()
    assert np.isneginf(sims[:, 5:]).all()
    sims, found = index.search_rows(queries, np.empty(0, dtype=np.int64), 2)
    assert (found == -1).all()
    with pytest.raises(IndexFault, match=r"0\.\.299"):
        index.search_rows(queries, np.array([300]), 1)
    with pytest.raises(IndexFault, match=r"0\.\.299"):
        index.search_rows(queries, np.array([-1]), 1)


def test_long_vectors_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "_BLOCK_ROWS", 7)
    vectors = unit(50) * np.linspace(0.1, 30, 50, dtype=np.float32)[:, None]
    queries = unit(5, seed=4) * 11
    index = FlatIndex.build(vectors)
    for found, expected in zip(index.search(queries, 6), brute(vectors, queries, 6), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    rows = np.arange(0, 50, 2)
    np.testing.assert_array_equal(
        index.search_rows(queries, rows, 6)[1], brute(vectors, queries, 6, rows)[1]
    )


def test_empty_index_and_no_queries(tmp_path: Path) -> None:
    index = FlatIndex.build(np.empty((0, 8), dtype=np.float32))
    sims, rows = index.search(unit(2, dim=8), 3)
    assert rows.tolist() == [[-1] * 3] * 2
    assert np.isneginf(sims).all()
    assert len(index) == 0
    write_indexes(tmp_path / "empty.faiss", [index])
    assert read_indexes(tmp_path / "empty.faiss", [0])[0].dim == 8
    assert FlatIndex.build(unit(4, dim=8)).search(np.empty((0, 8)), 3)[1].shape == (0, 3)


def test_save_and_load(tmp_path: Path) -> None:
    vectors, queries = unit(100), unit(4, seed=5)
    index = FlatIndex.build(vectors)
    write_indexes(tmp_path / "index.faiss", [index])
    (again,) = read_indexes(tmp_path / "index.faiss", [100])
    for left, right in zip(index.search(queries, 5), again.search(queries, 5), strict=True):
        np.testing.assert_array_equal(left, right)
    np.testing.assert_array_equal(again.reconstruct(np.array([7, 3])), vectors[[7, 3]])
    copy = again.reconstruct(np.array([0]))
    copy[:] = 0  # a copy: the index is untouched
    np.testing.assert_array_equal(again.reconstruct(np.array([0])), vectors[:1])


def test_damaged_or_foreign_files_are_refused(tmp_path: Path) -> None:
    import faiss

    with pytest.raises(IndexFault, match="no such index file"):
        read_indexes(tmp_path / "absent", [1])
    path = tmp_path / "index.faiss"
    write_indexes(path, [FlatIndex.build(unit(50))])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(IndexFault, match="not a readable FAISS index"):
        read_indexes(path, [1])
    path.write_bytes(b"garbage")
    with pytest.raises(IndexFault, match="not a readable FAISS index"):
        read_indexes(path, [1])
    other = faiss.IndexFlatL2(4)
    faiss.write_index(other, str(path))
    with pytest.raises(IndexFault, match="expected an inner-product index"):
        read_indexes(path, [1])
    poisoned = faiss.IndexFlatIP(4)
    poisoned.add(np.full((1, 4), np.nan, dtype=np.float32))
    faiss.write_index(poisoned, str(path))
    with pytest.raises(IndexFault, match="row 0 holds NaN"):
        read_indexes(path, [1])


def test_bad_vectors_and_queries_are_refused() -> None:
    vectors = unit(5)
    vectors[3, 1] = np.nan
    with pytest.raises(IndexFault, match="vectors: row 3 holds NaN or infinity"):
        FlatIndex.build(vectors)
    with pytest.raises(IndexFault, match="shape"):
        FlatIndex.build(np.zeros(5))
    index = FlatIndex.build(unit(5))
    with pytest.raises(IndexFault, match="queries have 8 dimensions, the index 24"):
        index.search(unit(1, dim=8), 1)
    with pytest.raises(IndexFault, match="queries: row 0 holds NaN"):
        index.search(np.full((1, 24), np.inf), 1)
    with pytest.raises(IndexFault, match="k must be at least 1"):
        index.search(unit(1), 0)


def test_gpu_modes_without_a_gpu() -> None:
    import faiss

    if faiss.get_num_gpus() > 0:
        pytest.skip("FAISS sees a GPU here; tests/gpu checks that case")
    index = FlatIndex.build(unit(5))
    assert index.to_gpu(gpu_place("auto")) is index
    assert not index.to_gpu(gpu_place("off")).on_gpu
    with pytest.raises(GpuFault, match="sees no GPU"):
        gpu_place("on")


def test_a_gpu_that_faiss_cannot_use_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with a FAISS without the card's code, which ends the process that tries: here, no card."""
    monkeypatch.setattr(gpu.faiss, "get_num_gpus", lambda: 10)
    gpu._fault.cache_clear()
    assert gpu_place("auto", device=9) is None
    assert "FAISS can't use GPU 9 (" in capsys.readouterr().err
    assert gpu_place("auto", device=9) is None and not capsys.readouterr().err  # asked once
    with pytest.raises(GpuFault, match=r"FAISS can't use GPU 9 .*install the extra `gpu`"):
        gpu_place("on", device=9)
    gpu._fault.cache_clear()


def test_torch_is_loaded_before_faiss() -> None:
    code = (
        "import sys; import memshare.retrieval.index; names = list(sys.modules); "
        "sys.exit(0 if names.index('torch') < names.index('faiss') else 'faiss came first')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
