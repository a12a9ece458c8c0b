"""The order of the data: an epoch's batches, each of one pool, the same on every process.

Pools take turns in a shuffled order. By default every example comes once an epoch. Two settings
change that: a *pool temperature* T above 1 gives a pool of n examples a share of n ** (1 / T) of
the batches, so that small pools are not drowned by large ones; and a cap on what one principal may
have of a batch (`principals`) makes batches smaller than they would be.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from memshare.arrays import Ints
from memshare.training.principals import PrincipalCap
from memshare.training.select import Selected


class Order:
    """Which examples make which step. ``steps_per_epoch`` batches of at most ``global_batch``."""

    def __init__(
        self,
        items: Sequence[Selected],
        *,
        global_batch: int,
        seed: int,
        pool_temperature: float = 1.0,
        max_principal_share: float = 1.0,
    ) -> None:
        """``max_principal_share``: of each batch, see `PrincipalCap`."""
        self._global_batch = global_batch
        self._seed = seed
        pools: dict[str, array[int]] = defaultdict(lambda: array("q"))
        for index, item in enumerate(items):
            pools[item.pool].append(index)
        self._cap = PrincipalCap(items, max_principal_share) if max_principal_share < 1.0 else None
        self._pools = {pool: np.array(pools[pool], dtype=np.int64) for pool in sorted(pools)}
        self._counts = self._shares(pool_temperature)
        self.steps_per_epoch = sum(self._counts.values())
        # Epochs are walked in order; the one before is kept for a step at the seam.
        self._epoch = lru_cache(maxsize=2)(lambda epoch: self._shuffle(epoch, self._cap))

    def left_out(self) -> int:
        """How many examples the cap on principals leaves out of the first epoch."""
        if self._cap is None:
            return 0
        sizes = (sum(map(len, batches)) for batches in (self._shuffle(0, None), self._epoch(0)))
        return next(sizes) - next(sizes)

    def step(self, number: int) -> Ints:
        """Positions of the items of step ``number`` (0, 1, ...)."""
        epoch, position = divmod(number, self.steps_per_epoch)
        return self._epoch(epoch)[position]

    def _shares(self, temperature: float) -> dict[str, int]:
        """Batches of each pool in an epoch."""
        natural = {
            pool: -(-len(members) // self._global_batch) for pool, members in self._pools.items()
        }
        if temperature == 1.0:
            return natural
        weights = {pool: len(rows) ** (1 / temperature) for pool, rows in self._pools.items()}
        total, whole = sum(natural.values()), sum(weights.values())
        return {pool: max(1, round(total * weights[pool] / whole)) for pool in natural}

    def _shuffle(self, epoch: int, cap: PrincipalCap | None) -> list[Ints]:
        rng = np.random.default_rng([self._seed, epoch])
        batches: list[Ints] = []
        for pool, members in self._pools.items():
            batches.extend(self._deal(members, self._counts[pool], rng, cap))
        return [batches[i] for i in rng.permutation(len(batches))]

    def _deal(
        self, members: Ints, count: int, rng: np.random.Generator, cap: PrincipalCap | None
    ) -> list[Ints]:
        """``count`` batches, as even as the members allow, none twice in a batch."""
        split = np.array_split if cap is None else cap.deal
        natural = -(-len(members) // self._global_batch)
        if count <= natural:  # all members, or as many as there is room for
            chosen = rng.permutation(members)[: count * self._global_batch]
            return list(split(chosen, count))
        batches: list[Ints] = []
        while len(batches) < count:
            batches += split(rng.permutation(members), natural)
        return batches[:count]
