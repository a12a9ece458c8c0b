"""Token ids of many texts as one array."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from memshare.retrieval.ragged import Ragged, on_device, spans
from tests.tiny import lists

ROWS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=8)


@given(ROWS, st.data())
def test_it_holds_what_the_lists_hold(rows: list[list[int]], data: st.DataObject) -> None:
    ragged = Ragged.of(rows)
    assert len(ragged) == len(rows) and lists(ragged) == rows
    which = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1))
    assert lists(ragged.take(np.array(which))) == [rows[i] for i in which]
    ids, real = ragged.padded(7)
    width = max(map(len, rows))
    assert ids.tolist() == [row + [7] * (width - len(row)) for row in rows]
    assert real.tolist() == [[1] * len(row) + [0] * (width - len(row)) for row in rows]


def test_spans_may_be_empty() -> None:
    at, whose = spans(np.array([5, 3, 0]), np.array([7, 3, 1]))
    assert (at.tolist(), whose.tolist()) == ([5, 6, 0], [0, 0, 2])


def test_on_the_cpu_nothing_is_copied() -> None:
    array = np.arange(3)
    assert on_device(array, torch.device("cpu")).data_ptr() == array.ctypes.data
