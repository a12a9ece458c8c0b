"""A sequence that is on disk: what grows with the examples' texts is not in memory.

Rows are lines of JSON in a file without a name, in ``TMPDIR``: it is gone with the process, so
nothing in it outlives the deletion of a memory. Memory holds eight bytes a row. Reading a row of a
few kilobytes takes some tens of microseconds: little before a training starts, too much in each of
its steps, which read numbers instead (`item_table`).
"""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")


class Spool(Sequence[T], Generic[T]):
    """Rows of one kind, written once and then read by place."""

    def __init__(self, to_json: Callable[[T], Any], from_json: Callable[[Any], T]) -> None:
        """``from_json`` gives back what ``to_json`` made of a row, once it has been JSON."""
        self._file = tempfile.TemporaryFile(prefix="memshare-")  # noqa: SIM115  # kept open
        self._to_json, self._from_json = to_json, from_json
        self._starts = array("q", [0])  # of all rows ever written, and the end
        self._order: Sequence[int] = range(0)

    def append(self, row: T) -> int:
        """Add a row at the end; returns its number for `arrange`."""
        line = json.dumps(self._to_json(row)).encode() + b"\n"
        self._file.write(line)
        self._starts.append(self._starts[-1] + len(line))
        self._order = range(len(self._starts) - 1)
        return len(self._order) - 1

    def arrange(self, numbers: Iterable[int]) -> None:
        """Keep the rows of these numbers, in this order; nothing can be added afterwards."""
        self._order = array("q", numbers)

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, place: int) -> T: ...

    @overload
    def __getitem__(self, place: slice) -> list[T]: ...

    def __getitem__(self, place: int | slice) -> T | list[T]:
        """The row, read from the file."""
        if isinstance(place, slice):
            return [self._read(number) for number in self._order[place]]
        return self._read(self._order[place])

    def _read(self, number: int) -> T:
        self._file.flush()
        start, end = self._starts[number], self._starts[number + 1]
        return self._from_json(json.loads(os.pread(self._file.fileno(), end - start, start)))
