"""Whether a pool's change log is still the one that rows were read from.

A database that was restored from a backup, or a standby that took over without the last changes,
counts on from an earlier position: at those that a reader has passed its log tells of other
changes, and what they brought would never be found. So a reader keeps the last change that it saw.
"""

from __future__ import annotations

from memshare.pool.errors import PoolError, UnknownPool
from memshare.pool.store import PoolStore
from memshare.records import Change


class AnotherHistory(PoolError):
    """A pool's log is not the one that what serves was read from: all of it must be read anew."""


def mark(change: Change) -> str:
    """What tells a change from another one of the same position."""
    return f"{change.kind} {change.id}"


def mark_at(store: PoolStore, pool: str, position: int) -> str | None:
    """The `mark` of the change at ``position``; None where the log has none there."""
    try:
        found = store.changes(pool, position - 1, 1) if position > 0 else []
    except UnknownPool:
        return None
    return mark(found[0]) if found else None


def goes_on(store: PoolStore, pool: str, position: int, known: str | None) -> bool:
    """Whether the log still has the change ``known`` at ``position``.

    None: a generation of an earlier version does not say which it was; one must be there.
    """
    found = mark_at(store, pool, position)
    return position == 0 or (found is not None and known in (None, found))
