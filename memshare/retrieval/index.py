"""Exact inner-product search over a pool's vectors: FAISS finds, float64 decides.

FAISS (on a GPU where there is one) proposes a few more rows than asked for; their similarities are
then computed in float64 and rounded to float32, so that the answer doesn't depend on the device, on
how many queries share a batch, or on where equal vectors stand. Where rounding could hide a better
row behind the ones proposed, the query is searched in full.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch  # noqa: F401  # before FAISS: both bring OpenMP and CUDA, and torch's must load first

# isort: split
import faiss

Gpu = Literal["auto", "on", "off"]

GPU_MAX_K = 2048  # what FAISS's GPU kernels can select
_SLACK = 16  # rows proposed beyond k: room for rounding and for a few equal vectors
_BLOCK_ROWS = 16_384  # rows converted to float64 at a time
_ERROR = 1e-5  # bound on float32 products' error, relative to the norms (FAISS uses no TF32)


class IndexFault(ValueError):
    """Vectors, queries or an index file that can't be used; the message says why."""


def _checked(vectors: np.ndarray, name: str, dim: int | None = None) -> np.ndarray:
    """``vectors`` as contiguous float32 (n, dim), refused where not finite or not of ``dim``."""
    array = np.ascontiguousarray(vectors, dtype=np.float32)
    if array.ndim != 2 or array.shape[1] == 0:
        raise IndexFault(f"{name}: expected shape (n, dim), got {array.shape}")
    if dim is not None and array.shape[1] != dim:
        raise IndexFault(
            f"{name} have {array.shape[1]} dimensions, the index {dim}: "
            "they come from another encoder; use the one of this index's generation"
        )
    for start in range(0, len(array), _BLOCK_ROWS):
        good = np.isfinite(array[start : start + _BLOCK_ROWS]).all(axis=1)
        if not good.all():
            row = start + int(np.flatnonzero(~good)[0])
            raise IndexFault(f"{name}: row {row} holds NaN or infinity")
    return array


class FlatIndex:
    """A flat inner-product index. Not thread-safe: one thread owns it."""

    def __init__(self, index: Any) -> None:
        """Use `build` or `load`; ``index`` is FAISS's IndexFlatIP in CPU form."""
        self._cpu = index
        self._gpu: Any = None
        self._resources: Any = None
        self.dim = int(index.d)
        self._norm = 0.0
        for start in range(0, len(self), _BLOCK_ROWS):
            norms = np.linalg.norm(self._vectors[start : start + _BLOCK_ROWS], axis=1)
            self._norm = max(self._norm, float(norms.max()))

    @classmethod
    def build(cls, vectors: np.ndarray) -> FlatIndex:
        """An index of ``vectors`` (n, dim); n may be 0. Raises `IndexFault` for NaN."""
        array = _checked(vectors, "vectors")
        index = faiss.IndexFlatIP(array.shape[1])
        index.add(array)
        return cls(index)

    @classmethod
    def load(cls, path: str | Path) -> FlatIndex:
        """Read what `save` wrote. Raises `IndexFault` for a damaged file or another index kind."""
        if not Path(path).is_file():
            raise IndexFault(f"{path}: no such index file")
        try:
            index = faiss.read_index(str(path))
        except RuntimeError as error:
            raise IndexFault(f"{path}: not a readable FAISS index ({error})") from error
        if (
            not isinstance(index, faiss.IndexFlat)
            or index.metric_type != faiss.METRIC_INNER_PRODUCT
        ):
            raise IndexFault(f"{path}: {type(index).__name__}, expected a flat inner-product index")
        found = cls(index)
        _checked(found._vectors, str(path))
        return found

    def save(self, path: str | Path) -> None:
        """Write the CPU form; atomicity is the publisher's business."""
        faiss.write_index(self._cpu, str(path))

    def __len__(self) -> int:
        """Number of vectors."""
        return int(self._cpu.ntotal)

    @property
    def _vectors(self) -> np.ndarray:
        """The stored vectors (n, dim), a view without a copy."""
        if len(self) == 0:
            return np.empty((0, self.dim), dtype=np.float32)
        flat = faiss.rev_swig_ptr(self._cpu.get_xb(), len(self) * self.dim)
        view: np.ndarray = flat.reshape(len(self), self.dim)
        return view

    @property
    def on_gpu(self) -> bool:
        """Whether searches use a GPU copy."""
        return self._gpu is not None

    def to_gpu(self, mode: Gpu = "auto", device: int = 0) -> FlatIndex:
        """Make a GPU copy with resources of its own; returns itself.

        ``auto`` does nothing where FAISS sees no GPU; ``on`` raises `IndexFault` there.
        """
        available = faiss.get_num_gpus()
        if mode == "on" and available == 0:
            raise IndexFault(
                "retriever.gpu is on, but FAISS sees no GPU: install the extra `gpu` "
                "(faiss-gpu-cu12) on a machine with CUDA, or set it to auto"
            )
        if mode != "off" and available > 0 and self._gpu is None:
            self._resources = faiss.StandardGpuResources()
            self._gpu = faiss.index_cpu_to_gpu(self._resources, device, self._cpu)
        return self

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k most similar rows for each query, similarity descending, then row ascending.

        ``queries`` (q, dim). Returns similarities (q, k) float32 and rows (q, k) int64; where the
        index has fewer than k rows, the rest is -inf and row -1. Raises `IndexFault`.
        """
        queries = _checked(queries, "queries", self.dim)
        similarities, rows = _padding(len(queries), k)
        asked = min(k + _SLACK, len(self))
        if asked == 0 or len(queries) == 0:
            return similarities, rows
        on_gpu = self._gpu is not None and asked <= GPU_MAX_K
        proposed, candidates = (self._gpu if on_gpu else self._cpu).search(queries, asked)
        error = _ERROR * self._norm
        for i, query in enumerate(queries):
            found, exact = self._best(query, np.sort(candidates[i]), k)
            hidden = float(proposed[i, -1]) + error * float(np.linalg.norm(query))
            if asked < len(self) and hidden >= exact[-1]:
                found, exact = self._scan(query, None, k)
            similarities[i, : len(found)], rows[i, : len(found)] = exact, found
        return similarities, rows

    def search_rows(
        self, queries: np.ndarray, rows: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """`search` among ``rows`` (r,) only: exact products over the gathered rows.

        For filtered searches, which FAISS's GPU index doesn't know. Repeated rows count once.
        """
        queries = _checked(queries, "queries", self.dim)
        allowed = self._checked_rows(np.unique(rows))
        similarities, found_rows = _padding(len(queries), k)
        if len(allowed):
            for i, query in enumerate(queries):
                found, exact = self._scan(query, allowed, k)
                similarities[i, : len(found)], found_rows[i, : len(found)] = exact, found
        return similarities, found_rows

    def reconstruct(self, rows: np.ndarray) -> np.ndarray:
        """The stored vectors (r, dim) float32 of ``rows`` (r,), copied."""
        return np.array(self._vectors[self._checked_rows(np.asarray(rows))])

    def _checked_rows(self, rows: np.ndarray) -> np.ndarray:
        rows = rows.astype(np.int64, copy=False)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexFault(f"rows must be in 0..{len(self) - 1}, got {rows.min()}..{rows.max()}")
        return rows

    def _scan(
        self, query: np.ndarray, allowed: np.ndarray | None, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Best k of ``allowed`` (ascending; None: all rows), none overlooked."""
        total = len(self) if allowed is None else len(allowed)
        rough = np.empty(total, dtype=np.float32)
        for start in range(0, total, _BLOCK_ROWS):
            stop = min(start + _BLOCK_ROWS, total)
            part = slice(start, stop) if allowed is None else allowed[start:stop]
            rough[start:stop] = self._vectors[part] @ query
        if k < total:
            error = 2 * _ERROR * self._norm * float(np.linalg.norm(query))
            near = np.flatnonzero(rough >= np.partition(rough, total - k)[total - k] - error)
        else:
            near = np.arange(total)
        return self._best(query, near if allowed is None else allowed[near], k)

    def _best(
        self, query: np.ndarray, candidates: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The first k of ``candidates`` (ascending rows) by exact similarity, and those."""
        exact = np.empty(len(candidates), dtype=np.float32)
        wide = query.astype(np.float64)
        for start in range(0, len(candidates), _BLOCK_ROWS):
            part = slice(start, start + _BLOCK_ROWS)
            exact[part] = self._vectors[candidates[part]].astype(np.float64) @ wide
        order = np.argsort(-exact, kind="stable")[:k]
        return candidates[order], exact[order]


def _padding(queries: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    if k < 1:
        raise IndexFault(f"k must be at least 1, got {k}")
    similarities = np.full((queries, k), -np.inf, dtype=np.float32)
    return similarities, np.full((queries, k), -1, dtype=np.int64)
