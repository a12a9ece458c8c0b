"""Bootstrap confidence intervals (Efron 1979, percentile form) for means and paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

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
