from itertools import product

import numpy as np
import pytest

from memshare.metrics.stats import (
    bootstrap_mean,
    holm,
    paired_bootstrap,
    paired_permutation,
    spearman,
)


def test_interval_agrees_with_the_normal_theory() -> None:
    values = np.random.default_rng(1).normal(2.0, 1.0, 400)
    interval = bootstrap_mean(values.tolist(), seed=3)
    half = 1.96 * values.std() / 20
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.01)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.01)


def test_same_seed_same_interval_and_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [0.0, 1.0, 5.0]
    whole = bootstrap_mean(values, resamples=1000, seed=7)
    assert whole == bootstrap_mean(values, resamples=1000, seed=7)
    monkeypatch.setattr("memshare.metrics.stats._BLOCK", 30)
    assert bootstrap_mean(values, resamples=1000, seed=7) == pytest.approx(whole)


def test_pairing_removes_variance_between_queries() -> None:
    base = np.random.default_rng(0).normal(0, 10, 100)
    better = base + 0.1
    interval = paired_bootstrap(better.tolist(), base.tolist())
    assert interval.low == pytest.approx(0.1) and interval.high == pytest.approx(0.1)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_mean([])
    with pytest.raises(ValueError, match="pairs"):
        paired_bootstrap([1.0], [1.0, 2.0])


def test_permutation_agrees_with_all_signs_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = [0.3, -0.1, 0.4, 0.2, -0.05, 0.6, 0.1]
    sums = [abs(np.dot(signs, differences)) for signs in product([-1, 1], repeat=7)]
    exact = np.mean([total >= abs(sum(differences)) - 1e-12 for total in sums])
    p = paired_permutation(differences, [0.0] * 7, draws=50_000, seed=1)
    assert p == pytest.approx(exact, abs=0.005)
    assert paired_permutation([0.0] * 7, differences, draws=50_000, seed=1) == p  # two-sided
    monkeypatch.setattr("memshare.metrics.stats._BLOCK", 700)
    assert paired_permutation(differences, [0.0] * 7, draws=50_000, seed=1) == pytest.approx(
        exact, abs=0.005
    )


def test_permutation_never_says_impossible_and_needs_pairs() -> None:
    assert paired_permutation([1.0] * 30, [0.0] * 30, draws=999) == 1 / 1000
    assert paired_permutation([1.0], [1.0]) == 1.0
    with pytest.raises(ValueError, match="pair"):
        paired_permutation([], [])


def test_holm_is_the_textbook_one() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_spearman_ranks_with_ties() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 4000]) == pytest.approx(1.0)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    assert spearman([1, 2, 2, 3], [1, 3, 2, 2]) == pytest.approx(
        0.5
    )  # ranks 1 2.5 2.5 4; 1 4 2.5 2.5
    assert spearman([1, 1], [1, 2]) == 0.0
