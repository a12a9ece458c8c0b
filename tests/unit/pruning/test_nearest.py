"""Which pair is the nearest one left, against looking at all of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from memshare.arrays import Floats
from memshare.pruning.evidence import Entry
from memshare.pruning.policies import by_near_duplicates


def rows(groups: int, each: int, spread: float, seed: int = 0) -> Floats:
    """Unit vectors in groups, as near to each other as ``spread`` is small."""
    rng = np.random.default_rng(seed)
    centres = np.repeat(rng.standard_normal((groups, 32)), each, axis=0)
    made = centres + spread * rng.standard_normal(centres.shape)
    found: Floats = (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)
    return found


def ranked(vectors: Floats, excess: int) -> list[int]:
    """What `by_near_duplicates` lets go, in its order; a later row is a better one."""
    entries = [Entry(str(row), row, None, "") for row in range(len(vectors))]
    evidence: Any = SimpleNamespace(
        entries=entries, vectors=vectors, excess=excess, grade=lambda entry: (0.0, entry.seq)
    )
    order = [int(name) for name in by_near_duplicates(evidence)]
    assert sorted(order) == list(range(len(vectors)))
    return order[:excess]


@pytest.mark.parametrize(("groups", "each", "spread"), [(150, 1, 1.0), (5, 30, 0.3)])
def test_the_nearest_pair_of_all_goes_first(groups: int, each: int, spread: float) -> None:
    vectors = rows(groups, each, spread)
    cosines = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    np.fill_diagonal(cosines, -9.0)
    expected = []
    for _ in range(len(vectors) - 1):
        expected.append(int(min(np.unravel_index(cosines.argmax(), cosines.shape))))
        cosines[expected[-1]] = cosines[:, expected[-1]] = -9.0
    assert ranked(vectors, len(vectors) - 1) == expected


@pytest.mark.parametrize("spread", [0.0, 1e-4])
def test_of_what_is_said_very_often_all_but_one_go_before_what_is_said_once(spread: float) -> None:
    """Long texts of one beginning have equal vectors, and then each knows the same few others."""
    vectors = np.concatenate([rows(1, 60, spread), rows(40, 1, 1.0, seed=1)])
    assert set(ranked(vectors, 59)) < set(range(60))
