"""Pruning a pool down to a cap, by a policy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from memshare.config import Config
from memshare.pool.store import PoolStore
from memshare.progress import log

_BLOCK = 2048  # memories looked at at a time
SLACK = 0.05  # of a cap: pruned so far below it, so that it is not done again at every write


class PruneError(RuntimeError):
    """Pruning that can't be done as asked."""


@dataclass(frozen=True, slots=True)
class PruneReport:
    """``before``: memories that might have gone; ``ids``: those that go, or went, in order."""

    pool: str
    policy: str
    before: int
    ids: tuple[str, ...]
    dry_run: bool


def prune(
    store: PoolStore, config: Config, pool: str, policy: str, cap: int, *, dry_run: bool = False
) -> PruneReport:
    """Delete memories of ``pool``, in the order of ``policy``, until ``cap`` are left.

    Held ones neither count nor go. A deletion erases the text for good and is followed by
    everything that follows the pool. Raises `PruneError` and `UnknownPool`.
    """
    if cap < 0:
        raise PruneError(f"cap: {cap} is negative")
    # Here, since they load torch, and the loop looks at its caps all day before one is reached.
    from memshare.pruning.evidence import Evidence
    from memshare.pruning.policies import find_policy

    order = find_policy(policy)
    evidence = Evidence(store, config, pool, cap)
    known = [entry.id for entry in evidence.entries]
    ids: tuple[str, ...] = ()
    if len(known) > cap:
        ranked = list(order(evidence))
        if sorted(ranked) != sorted(known):
            raise PruneError(f"policy {policy!r} does not rank each memory of {pool} once")
        ids = tuple(ranked[: len(known) - cap])
    if not dry_run:
        ids = tuple(_free(store, ids))
        store.delete_many(ids)
    return PruneReport(pool, policy, len(known), ids, dry_run)


def _free(store: PoolStore, ids: Sequence[str]) -> Iterator[str]:
    """Those of ``ids`` that still live, and were not put on hold while the policy took its time."""
    for start in range(0, len(ids), _BLOCK):
        block = ids[start : start + _BLOCK]
        found = store.get_many(block)
        yield from (id for id in block if id in found and not found[id].held)


def check_caps(config: Config) -> None:
    """Raise `PruneError` if a pool with a cap names a policy that there isn't."""
    for name, settings in config.pools.items():
        if settings.max_memories is not None:
            from memshare.pruning.policies import find_policy  # here, as in `prune`

            try:
                find_policy(settings.prune_by)
            except PruneError as error:
                raise PruneError(f"pools.{name}.prune_by: {error}") from error


def hold_caps(store: PoolStore, config: Config) -> list[PruneReport]:
    """Prune each pool that has grown beyond its ``max_memories``, to somewhat below it."""
    reports = []
    for name, settings in config.pools.items():
        if settings.max_memories is None:
            continue
        # The size is known without counting; held ones are counted only where they matter.
        excess = store.size(name) - settings.max_memories
        if excess <= 0 or excess <= store.held(name):
            continue
        cap = int(settings.max_memories * (1 - SLACK))
        report = prune(store, config, name, settings.prune_by, cap)
        log(
            f"pool {name}: {len(report.ids)} of {report.before} memories pruned by "
            f"{report.policy}, beyond the cap of {settings.max_memories}"
        )
        reports.append(report)
    return reports
