"""One pool's searchable rows: a generation's index, and the delta of memories newer than it.

Both hold vectors of one encoder. Rows are never removed: a deleted or held memory's row is masked,
and every search is over the rows that remain, so k asked for are k returned if k exist.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memshare.arrays import Floats, Ints, Mask
from memshare.records import Hit, Memory
from memshare.retrieval.columns import Columns
from memshare.retrieval.filters import Filter
from memshare.retrieval.gpu import GpuPlace
from memshare.retrieval.index import FlatIndex, Found

_COLUMN_BLOCK = 1000


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A shard's rows at one moment: what the next generation need not read from the pool."""

    ids: npt.NDArray[np.bytes_]
    columns: Columns
    position: int
    mark: str | None


class Shard:
    """The rows of one pool under one encoder. One thread at a time owns it.

    ``position``: every change of the pool up to this seq is in effect here. ``mark``: the change
    there (`memshare.retrieval.history`), None where it is not known.
    """

    def __init__(
        self,
        dim: int,
        index: FlatIndex | None = None,
        ids: npt.NDArray[np.bytes_] | None = None,
        position: int = 0,
        mark: str | None = None,
    ) -> None:
        """``ids`` (rows,) name the rows of ``index``; all are masked until `load_columns`."""
        self.position = position
        self.mark = mark
        self._index = index
        self._base_ids = np.empty(0, "S1") if ids is None else ids
        self._by_id = np.argsort(self._base_ids, kind="stable")
        self._delta_ids: list[str] = []
        self._delta_rows: dict[str, int] = {}
        self._delta = FlatIndex.build(np.empty((0, dim), np.float32))
        self._columns = Columns(len(self._base_ids))

    @property
    def rows(self) -> int:
        """Rows held, masked ones too."""
        return len(self._columns)

    @property
    def delta_rows(self) -> int:
        """Rows of memories newer than the index."""
        return len(self._delta_ids)

    @property
    def visible(self) -> int:
        """Memories that a search without a filter can return."""
        return int(np.count_nonzero(self._columns.visible))

    def load_columns(self, memories: Iterable[Memory]) -> None:
        """Learn what filters ask of the index's rows; a row not among ``memories`` is masked.

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

        Deletions and holds work at once, releases of memories that have a row too, and metadata
        that such a one gained. Returns the living memories without a row, which `add` takes next.
        Repeating it changes nothing.
        """
        new: list[Memory] = []
        again: list[tuple[int, Memory]] = []
        for id, memory in states.items():
            row = self._row(id)
            living = memory is not None and not memory.held
            if row is not None:
                self._columns.visible[row] = living
                if memory is not None and living:
                    again.append((row, memory))
            elif memory is not None and living:
                new.append(memory)
        self._columns.learn([row for row, _ in again], [memory for _, memory in again])
        return new

    def add(self, memories: Sequence[Memory], vectors: Floats) -> None:
        """Append memories without a row, with their ``vectors`` (n, dim)."""
        for memory in memories:
            self._delta_rows[memory.id] = len(self._base_ids) + len(self._delta_ids)
            self._delta_ids.append(memory.id)
        self._delta.add(vectors)
        self._columns.append(memories)

    def snapshot(self) -> Snapshot:
        """The rows as they are now, copied."""
        return Snapshot(self._all_ids(), self._columns.copy(), self.position, self.mark)

    def adopt(self, before: Snapshot) -> list[str]:
        """Learn of the rows, all masked so far, what an earlier generation's shard knew of them.

        Returns the ids of rows that it did not have. `position` goes back to the snapshot's if that
        is earlier: what changed in between the snapshot does not know.
        """
        if before.position < self.position:
            self.position, self.mark = before.position, before.mark
        if len(self._base_ids) == 0:
            return []
        places = np.searchsorted(self._base_ids, before.ids, sorter=self._by_id)
        rows = self._by_id[np.minimum(places, len(self._by_id) - 1)]
        theirs = np.flatnonzero(self._base_ids[rows] == before.ids)
        self._columns.take(rows[theirs], before.columns, theirs)
        known = np.zeros(len(self._base_ids), np.bool_)
        known[rows[theirs]] = True
        return [id.decode() for id in self._base_ids[~known].tolist()]

    def freeze(self, place: GpuPlace | None) -> None:
        """Make the delta part of the index; for a large delta, before searches begin."""
        vectors = self._delta.reconstruct(np.arange(len(self._delta)))
        if self._index is None:
            self._index = FlatIndex.build(vectors)
        else:
            self._index.add(vectors)
        self._index.to_gpu(place)
        self._base_ids = self._all_ids()
        self._by_id = np.argsort(self._base_ids, kind="stable")
        self._delta_ids, self._delta_rows = [], {}
        self._delta = FlatIndex.build(np.empty((0, self._index.dim), np.float32))

    def to_gpu(self, place: GpuPlace | None) -> None:
        """Make a GPU copy of the index, if there is none yet."""
        if self._index is not None:
            self._index.to_gpu(place)

    def top(self, queries: Floats, k: int, restrict: Filter | None = None) -> list[tuple[Hit, ...]]:
        """The k best visible rows for each of ``queries`` (q, dim), best first, ties by age.

        As exact as the index is; fewer than k only where fewer exist, filter or not.
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
                agent = int(self._columns.agents[row])
                if agent >= 0 and counts[agent] == most:
                    mask &= self._columns.agents != agent
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
        found: list[list[tuple[float, int]]] = [[] for _ in queries]
        if self._index is not None:
            _collect(found, self._index.search(queries, min(k, base) or 1, mask[:base]), 0)
        if len(self._delta):
            newer = self._delta.search(queries, min(k, len(self._delta)), mask[base:])
            _collect(found, newer, base)
            for hits in found:
                hits.sort(key=lambda hit: (-hit[0], hit[1]))
        return [hits[:k] for hits in found]

    def _mask(self, restrict: Filter | None) -> Mask:
        mask = self._columns.mask(restrict)
        for id in () if restrict is None else restrict.exclude:
            row = self._row(id)
            if row is not None:
                mask[row] = False
        return mask

    def _set_columns(self, memories: Sequence[Memory]) -> None:
        rows = self._base_rows([memory.id for memory in memories])
        pairs = [(row, m) for row, m in zip(rows.tolist(), memories, strict=True) if row >= 0]
        self._columns.set([row for row, _ in pairs], [memory for _, memory in pairs])

    def _base_rows(self, ids: Sequence[str]) -> Ints:
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

    def _all_ids(self) -> npt.NDArray[np.bytes_]:
        delta = np.array([id.encode() for id in self._delta_ids] or [b""], np.bytes_)
        return np.concatenate([self._base_ids, delta[: len(self._delta_ids)]])


def _collect(found: list[list[tuple[float, int]]], best: Found, first: int) -> None:
    """Add (similarity, row) of each query's ``best`` to ``found``; the first row is ``first``."""
    for hits, similarities, rows in zip(found, best[0].tolist(), best[1].tolist(), strict=True):
        hits.extend(
            (similarity, row + first)
            for similarity, row in zip(similarities, rows, strict=True)
            if row >= 0
        )
