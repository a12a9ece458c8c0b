"""Exact inner-product search over a pool's vectors: FAISS finds, float64 decides.

FAISS (on a GPU where there is one) proposes a few more rows than asked for; their similarities are
then computed in float64 and rounded to float32, so that the answer doesn't depend on the device, on
how many queries share a batch, or on where equal vectors stand. Where rounding could hide a better
row behind the ones proposed, the query is searched in full. `approximate` has the kinds of index
that propose without looking at every row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch  # noqa: F401  # before FAISS: both bring OpenMP and CUDA, and torch's must load first

# isort: split
import faiss

from memshare.arrays import Floats, Ints, Mask
from memshare.retrieval.gpu import GpuPlace

Found = tuple[Floats, Ints]

GPU_MAX_K = 2048  # what FAISS's GPU kernels can select
SLACK = 16  # rows proposed beyond k: room for rounding and for a few equal vectors
_WIDEN = 64  # and beyond the share of masked rows to be expected, when searching past them
_WIDEST = 4096  # beyond this, products over the gathered rows are cheaper
_BLOCK_ROWS = 16_384  # rows converted or gathered at a time
_BLOCK_FLOATS = 2**24  # rough products kept at a time
# Queries times dimensions from which FAISS multiplies matrices. 1.15 does so from 128,000, and pays
# for a micro-batch of 64 like for 64 queries (benchmarks/search_speed.py: `faiss_default_qps`).
_MATRIX_FROM = 512
_ERROR = 1e-5  # bound on float32 products' error, relative to the norms (FAISS uses no TF32)


class IndexFault(ValueError):
    """Vectors, queries or an index file that can't be used; the message says why."""


def checked(vectors: npt.ArrayLike, name: str, dim: int | None = None) -> Floats:
    """``vectors`` as contiguous float32 (n, dim), refused where not finite or not of ``dim``."""
    array: Floats = np.ascontiguousarray(vectors, dtype=np.float32)
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
    """A flat inner-product index. Not thread-safe: one thread owns it.

    ``cpu`` is FAISS's index in CPU form, in float32 or in half precision; similarities are exact
    for what it stores.
    """

    def __init__(self, index: Any) -> None:
        """Use `build`, `approximate.build_index` or `index_file.read_indexes`.

        Raises `IndexFault` for vectors that are not finite.
        """
        settings = faiss.cvar  # of the process; an earlier FAISS's threshold (20) is left alone
        settings.distance_compute_blas_threshold = min(
            settings.distance_compute_blas_threshold, _MATRIX_FROM
        )
        self.cpu = index
        self.dim = int(index.d)
        self._gpu: Any = None
        self._rounds = False  # the GPU copy computes in half precision
        self._norm = 0.0
        self._measure(0)

    @classmethod
    def build(cls, vectors: npt.ArrayLike) -> FlatIndex:
        """An index of ``vectors`` (n, dim); n may be 0. Raises `IndexFault` for NaN."""
        array = checked(vectors, "vectors")
        index = faiss.IndexFlatIP(array.shape[1])
        index.add(array)
        return cls(index)

    def add(self, vectors: npt.ArrayLike) -> None:
        """Append ``vectors`` (n, dim) in CPU form; a GPU copy has to be made again.

        Raises `IndexFault` for NaN.
        """
        start = len(self)
        self.cpu.add(checked(vectors, "vectors", self.dim))
        self._gpu = None
        self._measure(start)

    def __len__(self) -> int:
        """Number of vectors."""
        return int(self.cpu.ntotal)

    @property
    def kind(self) -> str:
        """As `IndexConfig` names it."""
        return "flat"

    @property
    def on_gpu(self) -> bool:
        """Whether searches use a GPU copy."""
        return self._gpu is not None

    def to_gpu(self, place: GpuPlace | None) -> FlatIndex:
        """Make a GPU copy in ``place`` (None: none is made); returns itself."""
        if place is not None and self._gpu is None:
            # Rows in half precision make FAISS's GPU form round the queries as well.
            self._rounds = place.float16 or not isinstance(self.cpu, faiss.IndexFlat)
            self._gpu = place.copy(self.cpu)
        return self

    def search(self, queries: Floats, k: int, allowed: Mask | None = None) -> Found:
        """The k most similar rows for each query, similarity descending, then row ascending.

        ``queries`` (q, dim); ``allowed`` (n,): rows that count, None for all. Returns similarities
        (q, k) float32 and rows (q, k) int64; where fewer than k rows count, the rest is -inf and
        row -1. Raises `IndexFault`.
        """
        queries = checked(queries, "queries", self.dim)
        if k < 1:
            raise IndexFault(f"k must be at least 1, got {k}")
        count = len(self) if allowed is None else int(np.count_nonzero(allowed))
        if count == 0 or len(queries) == 0:
            return _padding(len(queries), k)
        if allowed is None or count == len(self):
            return self._search_all(queries, k)
        return self._search_allowed(queries, k, allowed, count)

    def search_rows(self, queries: Floats, rows: npt.NDArray[Any], k: int) -> Found:
        """`search` among ``rows`` (r,) only, in any kind of index exact: every product is made.

        Repeated rows count once.
        """
        queries = checked(queries, "queries", self.dim)
        if k < 1:
            raise IndexFault(f"k must be at least 1, got {k}")
        return self._scan(queries, self._checked_rows(np.unique(rows)), k)

    def reconstruct(self, rows: npt.NDArray[Any]) -> Floats:
        """The stored vectors (r, dim) float32 of ``rows`` (r,), copied."""
        return np.array(self._take(self._checked_rows(np.asarray(rows))))

    def _search_all(self, queries: Floats, k: int) -> Found:
        asked = min(k + SLACK, len(self))
        on_gpu = self._gpu is not None and asked <= GPU_MAX_K
        proposed, candidates = (self._gpu if on_gpu else self.cpu).search(queries, asked)
        similarities, rows = self._decide(queries, candidates, k)
        if asked < len(self) and not (on_gpu and self._rounds):
            error = _ERROR * self._norm * np.linalg.norm(queries, axis=1)
            doubtful = np.flatnonzero(proposed[:, -1] + error >= similarities[:, -1])
            if len(doubtful):
                found = self._scan(queries[doubtful], None, k)
                similarities[doubtful], rows[doubtful] = found
        return similarities, rows

    def _search_allowed(self, queries: Floats, k: int, allowed: Mask, count: int) -> Found:
        """Few masked rows: search past them, wider until k are found. Many: gather the others."""
        total, enough = len(self), min(k, count)
        wide = min(total, enough * total // count + _WIDEN)
        while 4 * count >= total and wide <= max(_WIDEST, 4 * enough):
            similarities, rows = self._search_all(queries, wide)
            good = allowed[rows]  # wide <= total, so no row is padding
            if wide == total or int(good.sum(axis=1).min()) >= enough:
                first = np.argsort(~good, axis=1, kind="stable")[:, :enough]
                found = _padding(len(queries), k)
                found[0][:, :enough] = np.take_along_axis(similarities, first, axis=1)
                found[1][:, :enough] = np.take_along_axis(rows, first, axis=1)
                return found
            wide = min(total, 8 * wide)
        return self._scan(queries, np.flatnonzero(allowed), k)

    def _measure(self, start: int) -> None:
        """Learn the longest norm of the rows from ``start``, and that all are finite."""
        for row in range(start, len(self), _BLOCK_ROWS):
            block = self._take(slice(row, min(row + _BLOCK_ROWS, len(self))))
            squares = np.einsum("rd,rd->r", block, block)
            if not np.isfinite(squares).all():
                bad = row + int(np.flatnonzero(~np.isfinite(squares))[0])
                raise IndexFault(f"vectors: row {bad} holds NaN or infinity")
            self._norm = max(self._norm, float(np.sqrt(squares.max())))

    def _take(self, rows: slice | npt.NDArray[Any]) -> Floats:
        """The stored vectors of ``rows`` as float32 (r, dim); a view where that is possible."""
        return stored(self.cpu, len(self))[rows].astype(np.float32, copy=False)

    def _checked_rows(self, rows: npt.NDArray[Any]) -> Ints:
        rows = rows.astype(np.int64, copy=False)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexFault(f"rows must be in 0..{len(self) - 1}, got {rows.min()}..{rows.max()}")
        return rows

    def _scan(self, queries: Floats, allowed: Ints | None, k: int) -> Found:
        """Best k of ``allowed`` (ascending; None: all rows), none overlooked."""
        found = _padding(len(queries), k)
        total = len(self) if allowed is None else len(allowed)
        step = max(1, _BLOCK_FLOATS // max(total, 1))
        for start in range(0, len(queries) if total else 0, step):
            part = queries[start : start + step]
            rough = np.empty((len(part), total), dtype=np.float32)
            for row in range(0, total, _BLOCK_ROWS):
                stop = min(row + _BLOCK_ROWS, total)
                rows = slice(row, stop) if allowed is None else allowed[row:stop]
                np.matmul(part, self._take(rows).T, out=rough[:, row:stop])
            for i, query in enumerate(part):
                near = self._near(rough[i], float(np.linalg.norm(query)), k)
                near = near if allowed is None else allowed[near]
                best = self._decide(query[None], near[None], k)
                found[0][start + i], found[1][start + i] = best[0][0], best[1][0]
        return found

    def _near(self, rough: Floats, norm: float, k: int) -> Ints:
        """Places of ``rough`` among which the best k must be, for all that rounding may do."""
        if k >= len(rough):
            return np.arange(len(rough))
        least = np.partition(rough, len(rough) - k)[len(rough) - k]
        return np.flatnonzero(rough >= least - 2 * _ERROR * self._norm * norm)

    def _decide(self, queries: Floats, candidates: Ints, k: int) -> Found:
        """The first k of ``candidates`` (q, m) by exact similarity; -1 among them is padding."""
        candidates = np.sort(candidates, axis=1)
        exact = np.full(candidates.shape, -np.inf, dtype=np.float32)
        wide = queries.astype(np.float64)
        step = max(1, _BLOCK_ROWS // len(queries))
        for start in range(0, candidates.shape[1], step):
            part = candidates[:, start : start + step]
            vectors = self._take(np.maximum(part, 0).ravel()).astype(np.float64)
            # einsum sums every row in the same order, so equal vectors have equal similarities.
            exact[:, start : start + step] = np.einsum(
                "qmd,qd->qm", vectors.reshape(*part.shape, self.dim), wide
            )
        exact[candidates < 0] = -np.inf
        order = np.argsort(-exact, axis=1, kind="stable")[:, :k]
        similarities, rows = _padding(len(queries), k)
        similarities[:, : order.shape[1]] = np.take_along_axis(exact, order, axis=1)
        rows[:, : order.shape[1]] = np.take_along_axis(candidates, order, axis=1)
        return similarities, rows


def stored(index: Any, count: int) -> npt.NDArray[Any]:
    """The vectors (count, dim) of a flat FAISS index, float32 or float16, without a copy."""
    half = isinstance(index, faiss.IndexScalarQuantizer)
    if count == 0:
        return np.empty((0, index.d), dtype=np.float32)
    raw = faiss.rev_swig_ptr(index.codes.data(), count * index.d * (2 if half else 4))
    view: npt.NDArray[Any] = raw.view(np.float16 if half else np.float32).reshape(count, index.d)
    return view


def _padding(queries: int, k: int) -> Found:
    similarities = np.full((queries, k), -np.inf, dtype=np.float32)
    return similarities, np.full((queries, k), -1, dtype=np.int64)
