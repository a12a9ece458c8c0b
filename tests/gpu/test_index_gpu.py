"""FAISS on a GPU, beside torch in one process, must answer exactly as the CPU index does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memshare.config import IndexConfig
from memshare.retrieval.approximate import build_index
from memshare.retrieval.gpu import gpu_place
from memshare.retrieval.index import GPU_MAX_K, FlatIndex

pytestmark = pytest.mark.gpu


def unit(n: int, dim: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


@pytest.mark.parametrize("k", [1, 10, 1000, GPU_MAX_K, GPU_MAX_K + 1, 5000])
def test_gpu_equals_cpu(k: int) -> None:
    vectors = unit(20_000, 384, seed=0)
    vectors[100:140] = vectors[50]  # equal rows, more than what is over-fetched
    queries = np.concatenate([vectors[50:51], unit(70, 384, seed=1)])
    cpu, gpu = FlatIndex.build(vectors), FlatIndex.build(vectors).to_gpu(gpu_place("on"))
    assert gpu.on_gpu
    for left, right in zip(cpu.search(queries, k), gpu.search(queries, k), strict=True):
        np.testing.assert_array_equal(left, right)


def test_gpu_small_and_empty() -> None:
    queries = unit(3, 16, seed=2)
    for n in (0, 1, 5):
        cpu = FlatIndex.build(unit(n, 16, seed=3).reshape(n, 16))
        gpu = FlatIndex.build(unit(n, 16, seed=3).reshape(n, 16)).to_gpu(gpu_place("auto"))
        for left, right in zip(cpu.search(queries, 7), gpu.search(queries, 7), strict=True):
            np.testing.assert_array_equal(left, right)


def test_faiss_float32_error_is_within_the_bound_used() -> None:
    from memshare.retrieval import index as module

    vectors, queries = unit(5000, 1024, seed=4), unit(64, 1024, seed=5)
    gpu = FlatIndex.build(vectors).to_gpu(gpu_place("on"))
    sims, rows = gpu._gpu.search(queries, 50)
    exact = np.einsum("qd,qkd->qk", queries.astype(np.float64), vectors[rows].astype(np.float64))
    assert np.abs(sims - exact).max() < module._ERROR


def test_index_works_beside_torch() -> None:
    device = torch.device("cuda")
    weights = torch.nn.Linear(384, 384).to(device)
    index = FlatIndex.build(unit(1000, 384, seed=6)).to_gpu(gpu_place("on"))
    for step in range(5):
        batch = torch.from_numpy(unit(8, 384, seed=step)).to(device)
        weights(batch).sum().backward()
        torch.cuda.synchronize()
        assert index.search(batch.cpu().numpy(), 3)[1].min() >= 0
    assert torch.isfinite(weights.weight.grad).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["float32", "gpu-float16", "float16"])
@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_kinds_and_precisions(kind: str, precision: str) -> None:
    """The CPU decides, so what both find has the same similarity, and nearly all is found."""
    settings = IndexConfig.model_validate(
        {"kind": kind, "precision": precision, "approximate_from": 1000, "nprobe": 32}
    )
    vectors, queries = unit(20_000, 64, seed=7), unit(40, 64, seed=8)
    cpu = build_index(vectors, settings)
    gpu = build_index(vectors, settings).to_gpu(gpu_place("on", precision))
    assert gpu.on_gpu
    expected, found = cpu.search(queries, 10), gpu.search(queries, 10)
    for i in range(40):
        left, right = (dict(zip(r[1][i], r[0][i], strict=True)) for r in (expected, found))
        both = left.keys() & right.keys()
        assert len(both) >= 9 and all(left[row] == right[row] for row in both)
    allowed = np.arange(20_000) % 3 == 0
    assert allowed[gpu.search(queries, 50, allowed)[1]].all()


def test_graphs_stay_on_the_cpu() -> None:
    settings = IndexConfig(kind="hnsw", approximate_from=100)
    index = build_index(unit(500, 16, seed=9), settings).to_gpu(gpu_place("on"))
    assert not index.on_gpu
    assert index.search(unit(2, 16, seed=10), 3)[1].min() >= 0


def test_hundreds_of_pools_share_one_scratch_space() -> None:
    place = gpu_place("on")
    before = torch.cuda.mem_get_info()[0]
    indexes = [FlatIndex.build(unit(50, 32, seed=i)).to_gpu(place) for i in range(300)]
    for index in indexes:
        assert index.search(unit(1, 32, seed=0), 3)[1].min() >= 0
    assert before - torch.cuda.mem_get_info()[0] < 2 * 2**30
