"""Filters over rows against plain Python, and what the next generation takes over."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from memshare.records import Memory
from memshare.retrieval.columns import Columns
from memshare.retrieval.filters import Filter, term, terms_of

SCALARS = st.sampled_from(["a", "b", "1", 1, 1.0, 1.5, 0, True, False])
METADATA = st.dictionaries(
    st.sampled_from(["topic", "lang", "n"]),
    SCALARS | st.lists(SCALARS, max_size=3) | st.just(None) | st.just({"deep": 1}),
    max_size=3,
)


def memory(i: int, metadata: dict[str, Any], agent: str | None = "ann") -> Memory:
    day = f"2026-01-{1 + i % 28:02d}T00:00:00.000000Z"
    return Memory(f"m{i}", "p", "q", "a", None, agent, None, day, metadata, i + 1)


def has(metadata: dict[str, Any], key: str, value: Any) -> bool:
    def same(left: Any) -> bool:
        return isinstance(left, bool) == isinstance(value, bool) and left == value

    mine = metadata.get(key)
    return any(same(item) for item in (mine if isinstance(mine, list) else [mine]))


@settings(deadline=None, max_examples=200)
@given(
    held=st.lists(METADATA, max_size=12),
    wanted=st.dictionaries(st.sampled_from(["topic", "lang", "n"]), SCALARS, max_size=2),
    set_first=st.integers(0, 12),
)
def test_metadata_filters(
    held: list[dict[str, Any]], wanted: dict[str, Any], set_first: int
) -> None:
    memories = [memory(i, metadata) for i, metadata in enumerate(held)]
    first = min(set_first, len(held))
    columns = Columns(first)
    columns.set(range(first), memories[:first])
    columns.append(memories[first:])
    expected = [all(has(m, key, value) for key, value in wanted.items()) for m in held]
    assert columns.mask(Filter(terms=terms_of(wanted))).tolist() == expected


def test_equal_values_are_equal_terms() -> None:
    assert term("a", 1) == term("a", 1.0) != term("a", True) != term("a", "1")
    assert Filter(terms=terms_of({"a": 1})) != Filter(terms=terms_of({"a": True}))
    assert terms_of({"a": ["x", "y", {}], "b": None}) == {term("a", "x"), term("a", "y")}


def test_taking_over_what_an_earlier_generation_knew() -> None:
    agents = ["ann", "bob", None, "ann"]
    old = Columns(0)
    old.append([memory(i, {"n": i % 2}, agents[i]) for i in range(4)])
    old.visible[1] = False
    taken = old.copy()
    old.visible[3] = False  # later than the copy
    old.append([memory(4, {"n": 0}, "eve")])
    new = Columns(5)
    new.take(np.array([4, 0, 2]), taken, np.array([0, 1, 3]))
    new.set([1], [memory(9, {"n": 1}, "bob")])
    assert new.mask(None).tolist() == [False, True, True, False, True]
    assert new.mask(Filter(agent="ann")).tolist() == [False, False, True, False, True]
    assert new.mask(Filter(agent="bob")).tolist() == [False, True, False, False, False]
    assert new.mask(Filter(terms=terms_of({"n": 1}))).tolist() == [False, True, True, False, False]
    late = Filter(created_after="2026-01-02", created_before="2026-01-05")
    assert new.mask(late).tolist() == [False, False, True, False, False]
