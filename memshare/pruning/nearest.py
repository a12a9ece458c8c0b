"""The nearest pair of what is left of some vectors, again and again while they go one by one.

Each row knows its nearest others as of when they were looked for; the first of them that is still
there is the nearest one now. Rows are in a heap by how near that one is, and those all of whose
known others have gone are looked for anew, together, when it is their turn.
"""

from __future__ import annotations

import heapq

import numpy as np

from memshare.arrays import Floats, Ints
from memshare.retrieval.index import FlatIndex

_NEIGHBOURS = 8  # that a row knows
_QUERIES = 1024  # searched at a time
# Length of what is added to a unit vector where neighbours are looked for, not where they are
# compared: of many equal vectors, as long texts of one beginning have, all would know the same few.
_SHAKE = 0.01


class NearestPairs:
    """Unit rows (n, dim), all of them left at first."""

    def __init__(self, vectors: Floats) -> None:
        """Looks for the neighbours of all rows."""
        self._vectors = vectors
        count, dim = vectors.shape
        shaken = np.random.default_rng(0).standard_normal((count, dim), np.float32)
        shaken *= np.float32(_SHAKE / dim**0.5)
        shaken += vectors
        shaken /= np.linalg.norm(shaken, axis=1, keepdims=True)
        self._index = FlatIndex.build(shaken)
        self._there = np.append(np.ones(count, bool), False)  # row -1 stands for nobody
        self._known = np.full((count, _NEIGHBOURS), -1)
        self._cosines = np.full((count, _NEIGHBOURS), -np.inf, np.float32)
        self._look(self.left())
        self._heap = [(-float(cosine), row) for row, cosine in enumerate(self._cosines[:, 0])]
        heapq.heapify(self._heap)  # by a cosine that each row had once, so never behind its turn

    def left(self) -> Ints:
        """The rows that were not dropped."""
        return np.flatnonzero(self._there)

    def drop(self, row: int) -> None:
        """Let ``row`` go."""
        self._there[row] = False

    def nearest(self) -> tuple[int, int]:
        """The nearest two rows of those left, of which there are two at least."""
        while True:
            far, row = self._heap[0]
            there = self._there[self._known[row]]
            if not self._there[row]:
                heapq.heappop(self._heap)
            elif not there.any():
                rows = self.left()
                self._look(rows[~self._there[self._known[rows]].any(axis=1)])
            else:
                place = int(there.argmax())
                now = -float(self._cosines[row, place])
                if now == far:
                    return row, int(self._known[row, place])
                heapq.heapreplace(self._heap, (now, row))

    def _look(self, rows: Ints) -> None:
        """Find the nearest others of ``rows`` among those left."""
        for start in range(0, len(rows), _QUERIES):
            block = rows[start : start + _QUERIES]
            queries = self._index.reconstruct(block)
            _, found = self._index.search(queries, _NEIGHBOURS + 1, self._there[:-1])
            found[found == block[:, None]] = -1
            cosines = np.einsum("rd,rnd->rn", self._vectors[block], self._vectors[found])
            cosines[found < 0] = -np.inf
            best = (-cosines).argsort(axis=1, kind="stable")[:, :_NEIGHBOURS]
            self._known[block] = np.take_along_axis(found, best, axis=1)
            self._cosines[block] = np.take_along_axis(cosines, best, axis=1)
