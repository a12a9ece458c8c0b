"""What filters ask of each row: its state, agent, time and metadata, as arrays."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from memshare.arrays import Ints, Mask
from memshare.records import Memory
from memshare.retrieval.filters import Filter, microseconds, terms_of


class Growing:
    """An array that grows at its end in amortised constant time; ``view`` is what is in it."""

    def __init__(self, dtype: Any) -> None:
        """An empty array (n,)."""
        self._data = np.empty(0, dtype=dtype)
        self._size = 0

    @property
    def view(self) -> npt.NDArray[Any]:
        """The values so far; writable in place, invalid after the next `extend`."""
        return self._data[: self._size]

    def extend(self, values: npt.ArrayLike) -> None:
        """Append ``values``."""
        new = np.asarray(values, dtype=self._data.dtype)
        size = self._size + len(new)
        if size > len(self._data):
            data = np.empty(max(size, 2 * len(self._data)), self._data.dtype)
            data[: self._size] = self.view
            self._data = data
        self._data[self._size : size] = new
        self._size = size


class Columns:
    """A shard's rows as filters see them. Rows are only ever added, and masked, not removed.

    Metadata is a list of (row, term) pairs, the term as a 64-bit hash that differs between
    processes: 12 bytes a value, whatever its length.
    """

    def __init__(self, rows: int) -> None:
        """``rows`` that are masked until `set`."""
        self._visible = Growing(np.bool_)
        self._agents = Growing(np.int32)
        self._created = Growing(np.int64)
        self._agent_codes: dict[str, int] = {}
        self._term_rows = Growing(np.int32)
        self._terms = Growing(np.int64)
        self._visible.extend(np.zeros(rows, np.bool_))
        self._agents.extend(np.full(rows, -1, np.int32))
        self._created.extend(np.zeros(rows, np.int64))

    def __len__(self) -> int:
        """Rows, masked ones too."""
        return len(self._visible.view)

    @property
    def visible(self) -> Mask:
        """(rows,) False for a masked one; writable."""
        view: Mask = self._visible.view
        return view

    @property
    def agents(self) -> npt.NDArray[np.int32]:
        """(rows,) Equal numbers for memories by the same agent, -1 where none is named."""
        view: npt.NDArray[np.int32] = self._agents.view
        return view

    def append(self, memories: Sequence[Memory]) -> None:
        """Add a row for each, not masked."""
        start = len(self)
        self._visible.extend(np.ones(len(memories), np.bool_))
        self._agents.extend([self._code(memory.agent) for memory in memories])
        self._created.extend([microseconds(memory.created_at) for memory in memories])
        self._set_terms(range(start, len(self)), memories)

    def set(self, rows: Sequence[int], memories: Sequence[Memory]) -> None:
        """What ``rows`` are, told once; held memories are masked."""
        for row, memory in zip(rows, memories, strict=True):
            self._visible.view[row] = not memory.held
            self._agents.view[row] = self._code(memory.agent)
            self._created.view[row] = microseconds(memory.created_at)
        self._set_terms(rows, memories)

    def learn(self, rows: Sequence[int], memories: Sequence[Memory]) -> None:
        """Metadata that ``memories``, which are in ``rows``, may have gained.

        All at one time, since the terms of all rows are looked through for those of these.
        """
        told = [pair for pair in zip(rows, memories, strict=True) if pair[1].metadata]
        if not told:
            return
        asked = np.zeros(len(self), np.bool_)
        asked[[row for row, _ in told]] = True
        term_rows = self._term_rows.view
        at = asked[term_rows]
        known = set(zip(term_rows[at].tolist(), self._terms.view[at].tolist(), strict=True))
        every = [(row, hash(term)) for row, memory in told for term in terms_of(memory.metadata)]
        fresh = [pair for pair in every if pair not in known]
        self._term_rows.extend([row for row, _ in fresh])
        self._terms.extend([term for _, term in fresh])

    def copy(self) -> Columns:
        """These columns as they are now."""
        return copy.deepcopy(self)

    def take(self, rows: Ints, other: Columns, theirs: Ints) -> None:
        """Before any `set`: ``rows`` (r,) are what the rows ``theirs`` (r,) of ``other`` are."""
        self._agent_codes = dict(other._agent_codes)
        for mine, old in (
            (self._visible, other._visible),
            (self._agents, other._agents),
            (self._created, other._created),
        ):
            mine.view[rows] = old.view[theirs]
        place = np.full(len(other), -1, np.int32)
        place[theirs] = rows
        moved = place[other._term_rows.view]
        self._term_rows.extend(moved[moved >= 0])
        self._terms.extend(other._terms.view[moved >= 0])

    def mask(self, restrict: Filter | None) -> Mask:
        """(rows,) False for what is masked or does not pass; ``exclude`` is the caller's.

        Without ``restrict`` not a copy.
        """
        mask = self.visible
        if restrict is None:
            return mask
        mask = mask.copy()
        if restrict.agent is not None:
            mask &= self._agents.view == self._agent_codes.get(restrict.agent, -2)
        if restrict.created_after is not None:
            mask &= self._created.view >= microseconds(restrict.created_after)
        if restrict.created_before is not None:
            mask &= self._created.view < microseconds(restrict.created_before)
        for term in restrict.terms:
            having = np.zeros(len(mask), np.bool_)
            having[self._term_rows.view[self._terms.view == hash(term)]] = True
            mask &= having
        return mask

    def _set_terms(self, rows: Sequence[int], memories: Sequence[Memory]) -> None:
        pairs = [
            (row, hash(term))
            for row, memory in zip(rows, memories, strict=True)
            if memory.metadata
            for term in terms_of(memory.metadata)
        ]
        if pairs:
            self._term_rows.extend([row for row, _ in pairs])
            self._terms.extend([term for _, term in pairs])

    def _code(self, agent: str | None) -> int:
        return -1 if agent is None else self._agent_codes.setdefault(agent, len(self._agent_codes))
