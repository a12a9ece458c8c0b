import numpy as np
import pytest

from memshare.metrics.stats import bootstrap_mean, paired_bootstrap


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
