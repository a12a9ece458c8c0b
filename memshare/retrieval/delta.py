"""One pool's searchable rows: a generation's index, and the delta of memories newer than it.

Both hold vectors of one encoder. Rows are never removed: a deleted or held memory's row is masked,
and every search is exact over the rows that remain, so k asked for are k returned if k exist.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from memshare.records import Hit, Memory
from memshare.retrieval.filters import Filter, microseconds
from memshare.retrieval.index import FlatIndex, Gpu

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
_WIDEN = 64  # masked rows allowed for at first when searching past them
_WIDEST = 4096  # beyond this, products over the gathered rows are cheaper
_ERROR = 1e-5  # bound on float32 rounding of a product of two unit vectors
_COLUMN_BLOCK = 1000


class Growing:
    """An array that grows at its end in amortised constant time; ``view`` is what is in it."""

    def __init__(self, dtype: Any, width: int | None = None) -> None:
        """An empty array, (n,) or (n, width)."""
        self._shape = () if width is None else (width,)
        self._data = np.empty((16, *self._shape), dtype=dtype)
        self._size = 0

    @property
    def view(self) -> npt.NDArray[Any]:
        """The values so far; writable in place, invalid after the next `extend`."""
        return self._data[: self._size]

    def extend(self, values: npt.ArrayLike) -> None:
        """Append ``values``."""
        new = np.asarray(values, dtype=self._data.dtype).reshape(-1, *self._shape)
        size = self._size + len(new)
        if size > len(self._data):
            data = np.empty((max(size, 2 * len(self._data)), *self._shape), self._data.dtype)
            data[: self._size] = self.view
            self._data = data
        self._data[self._size : size] = new
        self._size = size


class Shard:
    """The rows of one pool under one encoder. One thread at a time owns it.

    ``position``: every change of the pool up to this seq is in effect here.
    """

    def __init__(
        self,
        dim: int,
        index: FlatIndex | None = None,
        ids: npt.NDArray[np.bytes_] | None = None,
        position: int = 0,
    ) -> None:
        """``ids`` (rows,) name the rows of ``index``; all are masked until `load_columns`."""
        self.position = position
        self._index = index
        self._base_ids = np.empty(0, "S1") if ids is None else ids
        self._by_id = np.argsort(self._base_ids, kind="stable")
        self._delta_ids: list[str] = []
        self._delta_rows: dict[str, int] = {}
        self._vectors = Growing(np.float32, dim)
        self._visible = Growing(np.bool_)
        self._agents = Growing(np.int32)
        self._created = Growing(np.int64)
        self._agent_codes: dict[str, int] = {}
        base = len(self._base_ids)
        self._visible.extend(np.zeros(base, np.bool_))
        self._agents.extend(np.full(base, -1, np.int32))
        self._created.extend(np.zeros(base, np.int64))

    @property
    def rows(self) -> int:
        """Rows held, masked ones too."""
        return len(self._visible.view)

    @property
    def delta_rows(self) -> int:
        """Rows of memories newer than the index."""
        return len(self._delta_ids)

    @property
    def visible(self) -> int:
        """Memories that a search without a filter can return."""
        return int(np.count_nonzero(self._visible.view))

    def load_columns(self, memories: Iterable[Memory]) -> None:
        """Learn agent, time and state of the index's rows; a row not among ``memories`` is masked.

        Memories without a row are passed over.
        """
        block: list[Memory] = []
        for memory in memories:
            block.append(memory)
            if len(block) == _COLUMN_BLOCK:
                self._set_columns(block)
                block = []
        self._set_columns(block)

    def reconcile(self, states: Mapping[str, Memory | None]) -> list[Memory]:
        """Put the present state of each memory into effect; None means deleted.

        Deletions and holds work at once, releases of memories that have a row too. Returns the
        living memories without a row, which `add` takes next. Repeating it changes nothing.
        """
        new = []
        for id, memory in states.items():
            row = self._row(id)
            living = memory is not None and not memory.held
            if row is not None:
                self._visible.view[row] = living
            elif memory is not None and living:
                new.append(memory)
        return new

    def add(self, memories: Sequence[Memory], vectors: Floats) -> None:
        """Append memories without a row, with their ``vectors`` (n, dim)."""
        for memory in memories:
            self._delta_rows[memory.id] = len(self._base_ids) + len(self._delta_ids)
            self._delta_ids.append(memory.id)
        self._vectors.extend(vectors)
        self._visible.extend([True] * len(memories))
        self._agents.extend([self._code(memory.agent) for memory in memories])
        self._created.extend([microseconds(memory.created_at) for memory in memories])

    def freeze(self, gpu: Gpu) -> None:
        """Make the delta part of the index; for a large delta, before searches begin."""
        count = len(self._base_ids)
        base = (
            np.empty((0, self._vectors.view.shape[1]), np.float32)
            if self._index is None
            else self._index.reconstruct(np.arange(count))
        )
        vectors = np.concatenate([base, self._vectors.view])
        ids = [*self._base_ids.tolist(), *(id.encode() for id in self._delta_ids)]
        self._index = FlatIndex.build(vectors)
        if gpu != "off":
            self._index.to_gpu(gpu)
        self._base_ids = np.array(ids or [b""], dtype=np.bytes_)[: len(ids)]
        self._by_id = np.argsort(self._base_ids, kind="stable")
        self._delta_ids, self._delta_rows = [], {}
        self._vectors = Growing(np.float32, vectors.shape[1])

    def top(self, queries: Floats, k: int, restrict: Filter | None = None) -> list[tuple[Hit, ...]]:
        """The k best visible rows for each of ``queries`` (q, dim), best first, ties by age.

        Exact, filter or not; fewer than k only where fewer exist.
        """
        mask = self._mask(restrict)
        if restrict is None or restrict.max_per_agent is None:
            rows = self._top(queries, k, mask)
        else:
            most = restrict.max_per_agent
            rows = [self._spread(query, k, mask.copy(), most) for query in queries]
        return [
            tuple(Hit(self._id(row), similarity) for similarity, row in hits[:k]) for hits in rows
        ]

    def _spread(self, query: Floats, k: int, mask: Mask, most: int) -> list[tuple[float, int]]:
        """The k best for one query (dim,) of which no agent wrote more than ``most``.

        Whoever has that many is masked, and the search goes on for the rest: exact, and never
        short while others have memories. ``mask`` is used up.
        """
        kept: list[tuple[float, int]] = []
        counts: Counter[int] = Counter()
        while len(kept) < k:
            for similarity, row in self._top(query[None], k - len(kept), mask)[0]:
                agent = int(self._agents.view[row])
                if agent >= 0 and counts[agent] == most:
                    mask &= self._agents.view != agent
                    break
                counts[agent] += 1
                mask[row] = False
                kept.append((similarity, row))
            else:
                break
        return kept

    def _top(self, queries: Floats, k: int, mask: Mask) -> list[list[tuple[float, int]]]:
        """(similarity, row) of the k best rows that ``mask`` allows, for each query."""
        base = len(self._base_ids)
        found = [[] for _ in queries] if base == 0 else self._top_base(queries, k, mask[:base])
        for hits, more in zip(found, self._top_delta(queries, k, mask[base:]), strict=True):
            hits.extend((similarity, row + base) for similarity, row in more)
            hits.sort(key=lambda hit: (-hit[0], hit[1]))
        return [hits[:k] for hits in found]

    def _mask(self, restrict: Filter | None) -> Mask:
        mask: Mask = self._visible.view
        if restrict is None:
            return mask
        mask = mask.copy()
        if restrict.agent is not None:
            mask &= self._agents.view == self._agent_codes.get(restrict.agent, -2)
        if restrict.created_after is not None:
            mask &= self._created.view >= microseconds(restrict.created_after)
        if restrict.created_before is not None:
            mask &= self._created.view < microseconds(restrict.created_before)
        for id in restrict.exclude:
            row = self._row(id)
            if row is not None:
                mask[row] = False
        return mask

    def _top_base(self, queries: Floats, k: int, mask: Mask) -> list[list[tuple[float, int]]]:
        """Few masked rows: search past them, wider until k are found. Many: gather the others."""
        assert self._index is not None
        total, allowed = len(mask), int(np.count_nonzero(mask))
        k = min(k, allowed)
        if k == 0:
            return [[] for _ in queries]
        masked = total - allowed
        wide = min(total, k + min(masked, _WIDEN))
        while masked <= allowed and wide <= max(_WIDEST, k):
            similarities, rows = self._index.search(queries, wide)
            good = mask[rows]  # wide <= total, so no row is padding
            if wide == total or good.sum(axis=1).min() >= k:
                return [
                    list(zip(values[keep][:k].tolist(), found[keep][:k].tolist(), strict=True))
                    for values, found, keep in zip(similarities, rows, good, strict=True)
                ]
            wide = min(total, 4 * wide)
        similarities, rows = self._index.search_rows(queries, np.flatnonzero(mask), k)
        return [
            list(zip(values.tolist(), found.tolist(), strict=True))
            for values, found in zip(similarities, rows, strict=True)
        ]

    def _top_delta(self, queries: Floats, k: int, mask: Mask) -> list[list[tuple[float, int]]]:
        """Products with all delta vectors, then the best in float64, as `FlatIndex` does."""
        allowed = np.flatnonzero(mask)
        if len(allowed) == 0:
            return [[] for _ in queries]
        vectors = self._vectors.view
        rough = queries @ vectors.T
        found = []
        for query, row in zip(queries, rough, strict=True):
            near = allowed
            if k < len(allowed):
                values = row[allowed]
                near = allowed[values >= np.partition(values, -k)[-k] - _ERROR]
            exact = (vectors[near].astype(np.float64) @ query.astype(np.float64)).astype(np.float32)
            order = np.argsort(-exact, kind="stable")[:k]
            found.append(list(zip(exact[order].tolist(), near[order].tolist(), strict=True)))
        return found

    def _set_columns(self, memories: Sequence[Memory]) -> None:
        rows = self._base_rows([memory.id for memory in memories])
        for memory, row in zip(memories, rows.tolist(), strict=True):
            if row >= 0:
                self._visible.view[row] = not memory.held
                self._agents.view[row] = self._code(memory.agent)
                self._created.view[row] = microseconds(memory.created_at)

    def _base_rows(self, ids: Sequence[str]) -> npt.NDArray[np.int64]:
        """Rows of ``ids`` in the index, -1 for one that it lacks."""
        rows = np.full(len(ids), -1, np.int64)
        if len(self._base_ids) == 0 or not ids:
            return rows
        # Cut to the width of ours, so that NumPy need not copy ours; the test for equality follows.
        keys = np.array([id.encode() for id in ids], dtype=self._base_ids.dtype)
        places = np.searchsorted(self._base_ids, keys, sorter=self._by_id)
        places = self._by_id[np.minimum(places, len(self._by_id) - 1)]
        for i, (id, row) in enumerate(zip(ids, places.tolist(), strict=True)):
            if self._base_ids[row] == id.encode():
                rows[i] = row
        return rows

    def _row(self, id: str) -> int | None:
        row = self._delta_rows.get(id)
        if row is None:
            row = int(self._base_rows([id])[0])
        return None if row < 0 else row

    def _id(self, row: int) -> str:
        base = len(self._base_ids)
        return self._delta_ids[row - base] if row >= base else self._base_ids[row].decode()

    def _code(self, agent: str | None) -> int:
        return -1 if agent is None else self._agent_codes.setdefault(agent, len(self._agent_codes))
