"""Bootstrap confidence intervals (Efron 1979, percentile form) for means and paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_BLOCK = 1 << 22  # resampled values drawn at a time: bounds memory, not the result


class Interval(NamedTuple):
    """A mean with the bounds of its confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap_mean(
    values: Sequence[float], *, resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Interval of the mean of ``values`` (n,); raises ValueError where there are none."""
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or sample.size == 0:
        raise ValueError("a bootstrap needs at least one value")
    rng = np.random.default_rng(seed)
    per_block = max(1, _BLOCK // sample.size)
    means = np.concatenate(
        [
            sample[
                rng.integers(0, sample.size, (min(per_block, resamples - at), sample.size))
            ].mean(1)
            for at in range(0, resamples, per_block)
        ]
    )
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return Interval(float(sample.mean()), float(low), float(high))


def paired_bootstrap(
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of mean(ours - theirs) over pairs measured on the same queries."""
    if len(ours) != len(theirs):
        raise ValueError(f"pairs are needed: {len(ours)} values against {len(theirs)}")
    return bootstrap_mean(
        np.subtract(ours, theirs).tolist(), resamples=resamples, confidence=confidence, seed=seed
    )


def paired_permutation(
    ours: Sequence[float], theirs: Sequence[float], *, draws: int = 10_000, seed: int = 0
) -> float:
    """Two-sided p-value of the paired randomisation test (Fisher 1935): signs of differences.

    The share of random signs whose mean difference is at least as far from 0 as the one measured,
    which itself counts as one draw. Raises ValueError without pairs.
    """
    differences = np.subtract(ours, theirs)
    if differences.ndim != 1 or differences.size == 0:
        raise ValueError("a paired test needs at least one pair")
    rng = np.random.default_rng(seed)
    observed = abs(differences.sum())
    per_block = max(1, _BLOCK // differences.size)
    as_far = 0
    for at in range(0, draws, per_block):
        count = min(per_block, draws - at)
        signs = rng.integers(0, 2, (count, differences.size), dtype=np.int8) * 2.0 - 1.0
        as_far += int((np.abs(signs @ differences) >= observed - 1e-12).sum())
    return (as_far + 1) / (draws + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, so that any false finding is rare (Holm 1979)."""
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def spearman(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Rank correlation (Spearman 1904), ties at their mean rank; 0 where either is constant."""
    left, right = (ranks - ranks.mean() for ranks in (_mean_ranks(ours), _mean_ranks(theirs)))
    spread = float(np.sqrt((left @ left) * (right @ right)))
    return float(left @ right) / spread if spread else 0.0


def _mean_ranks(values: Sequence[float]) -> npt.NDArray[np.float64]:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: npt.NDArray[np.float64] = (ends - (counts - 1) / 2.0)[which]
    return ranks
