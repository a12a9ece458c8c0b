"""Policies: in which order memories go. Each is a function; more come in as plug-ins.

A policy takes the `Evidence` about a pool and returns the ids of all its memories, the first to go
first; no more than `Evidence.excess` of them go. Another package adds one by an entry point in the
group ``memshare.pruning`` that names such a function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import entry_points

from memshare.progress import log
from memshare.pruning.evidence import Entry, Evidence
from memshare.pruning.leave_one_out import by_leave_one_out
from memshare.pruning.nearest import NearestPairs
from memshare.pruning.prune import PruneError

Policy = Callable[[Evidence], Sequence[str]]
GROUP = "memshare.pruning"


def by_score(evidence: Evidence) -> list[str]:
    """The worst graded first, of equals the oldest; one without a grade counts as just admitted."""
    return [entry.id for entry in sorted(evidence.entries, key=evidence.grade)]


def by_age(evidence: Evidence) -> list[str]:
    """The oldest in the pool first."""
    return [entry.id for entry in evidence.entries]


def by_use(evidence: Evidence) -> list[str]:
    """The least found per day first.

    Its first day in the pool counts as one use, so that a new memory has its chance.
    """
    now = datetime.now(UTC)

    def rate(entry: Entry) -> float:
        days = (now - datetime.fromisoformat(entry.created_at)).total_seconds() / 86_400
        return (evidence.uses.get(entry.id, 0) + 1) / (max(days, 0.0) + 1)

    return [entry.id for entry in sorted(evidence.entries, key=lambda e: (rate(e), e.seq))]


def by_usefulness(evidence: Evidence) -> list[str]:
    """The least measured usefulness first, of equals the oldest.

    The mean gain in likelihood when it was shown, with one measurement of zero added: few
    measurements say little, and a memory without any goes after the harmful ones.
    """
    if not evidence.gains:
        log(
            f"{evidence.pool}: no memory's gain was ever measured, as mining.labels: likelihood "
            "and reward do with mining.baseline; the oldest go first"
        )

    def gain(entry: Entry) -> float:
        total, number = evidence.gains.get(entry.id, (0.0, 0))
        return total / (number + 1)

    return [entry.id for entry in sorted(evidence.entries, key=lambda e: (gain(e), e.seq))]


def by_feedback(evidence: Evidence) -> list[str]:
    """The lowest standing with the principals first (see `pool.feedback`), of equals the oldest."""
    standing = evidence.standings
    return [e.id for e in sorted(evidence.entries, key=lambda e: (standing.get(e.id, 0.0), e.seq))]


def by_near_duplicates(evidence: Evidence) -> list[str]:
    """What is most nearly said by another memory first: of the nearest pair left, the worse graded.

    Once `Evidence.excess` have gone the others follow as they came.
    """
    worth = [evidence.grade(entry) for entry in evidence.entries]
    pairs = NearestPairs(evidence.vectors)
    order: list[int] = []
    while len(order) < min(evidence.excess, len(worth) - 1):
        loser = min(pairs.nearest(), key=worth.__getitem__)
        pairs.drop(loser)
        order.append(loser)
    return [evidence.entries[row].id for row in [*order, *pairs.left().tolist()]]


POLICIES: dict[str, Policy] = {
    "score": by_score,
    "age": by_age,
    "use": by_use,
    "feedback": by_feedback,
    "near-duplicates": by_near_duplicates,
    "usefulness": by_usefulness,
    "leave-one-out": by_leave_one_out,
}


def policy_names() -> list[str]:
    """Every policy there is, plug-ins too."""
    return sorted({*POLICIES, *(point.name for point in entry_points(group=GROUP))})


def find_policy(name: str) -> Policy:
    """A policy by name; raises `PruneError` naming those that are there."""
    if name in POLICIES:
        return POLICIES[name]
    for point in entry_points(group=GROUP, name=name):
        policy: Policy = point.load()
        return policy
    raise PruneError(f"no pruning policy {name!r} (there: {', '.join(policy_names())})")
