"""How much of a batch one principal may have: what is over its share is left out of the epoch.

``training.max_principal_share`` keeps a busy or hostile agent from steering the encoder. Of every
batch as it is formed, one principal has at most that share (rounded down, but one at least)

* of the queries, by who wrote them, and
* of the positives, by who wrote those: a query with v positives has 1 / v of its place for each.

What has no room in a batch waits for the next one; what finds none is left out, and may come in
another epoch. With fewer than 1 / share principals the share can't be held but by *one at least*:
then batches are small, of one query for each principal. A pool that one principal wrote alone is
exempt: nobody is there to be outweighed. Unknown principals are nobody, and are not counted.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np

from memshare.arrays import Ints
from memshare.training.select import Selected

_EPSILON = 1e-9  # 0.29 * 100 is 28.999999999999996
_Parts = tuple[tuple[int, float], ...]  # numbers of who has a part in an example, and how large


class PrincipalCap:
    """Deals examples into batches of which no principal has more than its share."""

    def __init__(self, items: Iterable[Selected], share: float) -> None:
        """Reads ``items`` once; afterwards they are known by their places."""
        self._share = share
        self._authors = array("q")  # of each query; an unknown one is a number of its own
        self._parts: list[_Parts] = []
        numbers: dict[tuple[str, str, str], int] = {}  # pool, what was written, by whom
        wrote: dict[str, set[str | None]] = defaultdict(set)  # pool -> who did
        equal: dict[_Parts, _Parts] = {}  # each once in memory
        for index, item in enumerate(items):
            written = [("query", item.principal, 1.0)]
            written += [("positive", p.principal, 1 / len(item.positives)) for p in item.positives]
            parts: dict[int, float] = defaultdict(float)
            for what, who, part in written:
                if who:
                    parts[numbers.setdefault((item.pool, what, who), len(numbers))] += part
            row = tuple(parts.items())
            self._parts.append(equal.setdefault(row, row))
            author = numbers[item.pool, "query", item.principal] if item.principal else -1 - index
            self._authors.append(author)
            known = (p.principal for p in item.positives if p.principal)
            wrote[item.pool].update((item.principal or None, *known))
        exempt = {number for (pool, _, _), number in numbers.items() if len(wrote[pool]) == 1}
        for row in equal:
            equal[row] = tuple(part for part in row if part[0] not in exempt)
        self._parts = [equal[row] for row in self._parts]

    def deal(self, members: Ints, count: int) -> list[Ints]:
        """``count`` batches, as even as ``members`` and the share allow; none of them twice."""
        by_author: dict[int, list[int]] = defaultdict(list)
        for member in members.tolist():
            by_author[self._authors[member]].append(member)
        spread = list(chain.from_iterable(by_author.values()))
        batches: list[Ints] = []
        waiting: list[int] = []
        for start in range(count):
            dealt = spread[start::count]
            batch, rest = self._fit([*dealt, *waiting], len(dealt))
            batches.append(np.array(batch, dtype=np.int64))
            waiting = rest[: len(dealt)]  # so that what can't be placed does not pile up
        return batches

    def _fit(self, members: Sequence[int], size: int) -> tuple[list[int], list[int]]:
        """A batch of at most ``size`` of ``members``, first come first, and the others."""
        while True:
            limit = max(1, int(self._share * size + _EPSILON)) + _EPSILON
            held: dict[int, float] = defaultdict(float)
            batch: list[int] = []
            rest: list[int] = []
            for member in members:
                parts = self._parts[member]
                if len(batch) < size and all(held[who] + part <= limit for who, part in parts):
                    batch.append(member)
                    for who, part in parts:
                        held[who] += part
                else:
                    rest.append(member)
            if len(batch) == size:
                return batch, rest
            size = len(batch)  # a smaller batch, and the share of that
