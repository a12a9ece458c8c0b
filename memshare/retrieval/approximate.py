"""Indexes that don't look at every row: inverted lists (IVF) and navigable graphs (HNSW).

IVF (Jégou et al. 2011; `FAISS <https://arxiv.org/abs/2401.08281>`_) compares a query with the
vectors of the few lists whose centres are nearest; HNSW (Malkov & Yashunin 2018) walks a graph of
neighbours. Both only propose: similarities are exact, and k asked for are k returned if k exist,
filter or not. What may be missing is a row among the best; `recall_at_10` measures how often.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch  # noqa: F401  # before FAISS, as in `index`

# isort: split
import faiss

from memshare.arrays import Floats, Ints, Mask
from memshare.config import IndexConfig
from memshare.retrieval.gpu import GpuPlace
from memshare.retrieval.index import GPU_MAX_K, SLACK, FlatIndex, Found, IndexFault, checked, stored

_GATHER = 4096  # rows: so few are compared one by one sooner than a selection finds them
_GATHER_SHARE = 50  # and so is a 50th of all
_POINTS_PER_LIST = 39  # FAISS's lower bound for training a centre
_MOST_POINTS = 64  # and ours: its own (256) makes training four times as long for little
_COPIED = 65_536  # rows copied at a time
_SAMPLE = 200  # queries that measure recall


class ApproximateIndex(FlatIndex):
    """An IVF or HNSW index with the interface of the flat one. Not thread-safe."""

    @property
    def kind(self) -> str:
        """As `IndexConfig` names it."""
        return "hnsw" if _is_graph(self.cpu) else "ivf"

    def to_gpu(self, place: GpuPlace | None) -> FlatIndex:
        """As `FlatIndex.to_gpu`; HNSW has no form there and stays on the CPU."""
        if place is not None and self._gpu is None and not _is_graph(self.cpu):
            self._gpu = place.copy(self.cpu)
        return self

    def _search_all(self, queries: Floats, k: int) -> Found:
        asked = min(k + SLACK, len(self))
        on_gpu = self._gpu is not None and asked <= GPU_MAX_K
        _, candidates = (self._gpu if on_gpu else self.cpu).search(queries, asked)
        return self._complete(queries, candidates, k, None, len(self))

    def _search_allowed(self, queries: Floats, k: int, allowed: Mask, count: int) -> Found:
        if count <= max(_GATHER, len(self) // _GATHER_SHARE):
            return self._scan(queries, np.flatnonzero(allowed), k)
        # On the CPU, since FAISS's GPU indexes don't know selections.
        settings = _selection(self.cpu, allowed, count / len(self))
        _, candidates = self.cpu.search(queries, min(k + SLACK, count), params=settings)
        return self._complete(queries, candidates, k, allowed, count)

    def _complete(
        self, queries: Floats, candidates: Ints, k: int, allowed: Mask | None, count: int
    ) -> Found:
        """Decide among ``candidates``; a query that has too few of them is searched in full."""
        similarities, rows = self._decide(queries, candidates, k)
        short = np.flatnonzero(rows[:, min(k, count) - 1] < 0)
        if len(short):
            among = None if allowed is None else np.flatnonzero(allowed)
            similarities[short], rows[short] = self._scan(queries[short], among, k)
        return similarities, rows

    def _take(self, rows: slice | npt.NDArray[Any]) -> Floats:
        if _is_graph(self.cpu):
            flat = stored(faiss.downcast_index(self.cpu.storage), len(self))
            return flat[rows].astype(np.float32, copy=False)
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        vectors: Floats = self.cpu.reconstruct_batch(rows)
        return vectors


def build_index(vectors: npt.ArrayLike, config: IndexConfig) -> FlatIndex:
    """An index of ``vectors`` (n, dim) of the configured kind; flat for a small pool.

    Raises `IndexFault` for NaN.
    """
    array = checked(vectors, "vectors")
    flat = config.kind == "flat" or len(array) < config.approximate_from
    if flat and config.precision != "float16":
        return FlatIndex.build(array)
    rows = "SQfp16" if config.precision == "float16" else "Flat"
    kind = "flat" if flat else config.kind
    lists = config.nlist or round(4 * math.sqrt(len(array)))
    lists = max(1, min(lists, len(array) // _POINTS_PER_LIST))
    recipe = {"flat": rows, "ivf": f"IVF{lists},{rows}", "hnsw": f"HNSW{config.links},{rows}"}[kind]
    index: Any = faiss.index_factory(array.shape[1], recipe, faiss.METRIC_INNER_PRODUCT)
    if kind == "ivf":
        index.nprobe = min(config.nprobe, lists)
        index.cp.max_points_per_centroid = _MOST_POINTS
        if rows == "SQfp16":
            index.by_residual = False  # so that a copy of a copy is rounded once
    elif kind == "hnsw":
        index.hnsw.efConstruction, index.hnsw.efSearch = config.ef_construction, config.ef_search
    index.train(array)
    index.add(array)
    if kind == "ivf":
        index.make_direct_map()  # row -> vector, for exact products
    return wrap(index)


def wrap(index: Any) -> FlatIndex:
    """A FAISS index with our interface. Raises `IndexFault` for a kind or metric not used here."""
    known = (
        faiss.IndexFlat, faiss.IndexScalarQuantizer, faiss.IndexIVFFlat, faiss.IndexHNSWFlat,
        faiss.IndexIVFScalarQuantizer, faiss.IndexHNSWSQ,
    )  # fmt: skip
    if not isinstance(index, known) or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise IndexFault(f"{type(index).__name__}, expected an inner-product index of our kinds")
    flat = isinstance(index, known[:2])
    return FlatIndex(index) if flat else ApproximateIndex(index)


def exact(index: FlatIndex) -> FlatIndex:
    """The rows of ``index`` in one that looks at all of them; a flat index itself."""
    if index.kind == "flat":
        return index
    flat = FlatIndex.build(np.empty((0, index.dim), np.float32))
    for start in range(0, len(index), _COPIED):
        flat.add(index.reconstruct(np.arange(start, min(start + _COPIED, len(index)))))
    return flat


def recall_at_10(index: FlatIndex) -> float:
    """How many of a vector's ten nearest others ``index`` finds, averaged over a sample of its own.

    An equally similar row counts as well as the one that exact search gives. 1 for a flat index.
    """
    if index.kind == "flat":
        return 1.0
    count = len(index)
    sample = np.random.default_rng(0).choice(count, min(_SAMPLE, count), replace=False)
    k = min(11, count)  # itself, and ten others
    queries = index.reconstruct(sample)
    exact, _ = index.search_rows(queries, np.arange(count), k)
    similarities, rows = index.search(queries, k)
    others = (rows != sample[:, None]) & (similarities >= exact[:, -1:])
    return float(np.minimum(others.sum(axis=1) / max(k - 1, 1), 1.0).mean())


def _is_graph(index: Any) -> bool:
    return isinstance(index, faiss.IndexHNSW)


def _selection(index: Any, allowed: Mask, share: float) -> Any:
    """Search settings that see only ``allowed`` rows, and look further the fewer they are."""
    library: Any = faiss  # whose stubs don't know these
    selector = library.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
    if _is_graph(index):
        reach = min(math.ceil(index.hnsw.efSearch / share), index.ntotal)
        return library.SearchParametersHNSW(sel=selector, efSearch=reach)
    reach = min(math.ceil(index.nprobe / math.sqrt(share)), index.nlist)
    return library.SearchParametersIVF(sel=selector, nprobe=reach)
