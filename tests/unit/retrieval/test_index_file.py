from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memshare.config import IndexConfig
from memshare.retrieval.approximate import build_index
from memshare.retrieval.index import FlatIndex, IndexFault
from memshare.retrieval.index_file import read_indexes, write_indexes


def unit(n: int, seed: int, dim: int = 6) -> np.ndarray:
    raw = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return np.asarray(raw / np.maximum(np.linalg.norm(raw, axis=1, keepdims=True), 1e-9))


def test_pools_of_any_size_and_kind_in_one_file(tmp_path: Path) -> None:
    sizes, kinds = [3, 0, 400, 1, 0, 400], ["flat", "flat", "ivf", "flat", "hnsw", "hnsw"]
    parts = [unit(size, seed) for seed, size in enumerate(sizes)]
    settings = [IndexConfig.model_validate({"kind": k, "approximate_from": 100}) for k in kinds]
    path = tmp_path / "index.faiss"
    write_indexes(path, [build_index(v, s) for v, s in zip(parts, settings, strict=True)])
    found = read_indexes(path, sizes)
    assert [index.kind for index in found] == ["flat", "flat", "ivf", "flat", "flat", "hnsw"]
    for index, part in zip(found, parts, strict=True):
        np.testing.assert_array_equal(index.reconstruct(np.arange(len(part))), part)
    with pytest.raises(IndexFault, match=r"hold \[3, 0, 400\] rows, not \[3, 1, 400\]"):
        read_indexes(path, [3, 1, 400])
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(IndexFault, match="not a readable FAISS index"):
        read_indexes(path, sizes)


def test_a_generation_of_an_earlier_version_is_split(tmp_path: Path) -> None:
    vectors = unit(10, 0)
    write_indexes(tmp_path / "index.faiss", [FlatIndex.build(vectors)])
    found = read_indexes(tmp_path / "index.faiss", [4, 0, 6])
    for index, part in zip(found, (vectors[:4], vectors[4:4], vectors[4:]), strict=True):
        np.testing.assert_array_equal(index.reconstruct(np.arange(len(index))), part)


def test_a_disk_that_is_full_at_the_very_end_is_noticed() -> None:
    """What fits into a buffer is written when the file is closed, which is when it fails."""
    with pytest.raises(OSError, match="No space"):
        write_indexes(Path("/dev/full"), [FlatIndex.build(unit(3, 0))])
