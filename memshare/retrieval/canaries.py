"""Canaries: questions that an administrator chose, with the memories that must be found for them.

The gate's held-out queries come from the pool, so whoever fills the pool has a say in them. The
canaries are not the pool's to change: a file (``gate.canaries``) of one JSON object a line,
``{"pool", "question", "relevant": [memory id, ...]}``. A new generation that finds them worse than
the current one or the best so far, on average by more than ``gate.margin``, is refused. They are
few and chosen, no sample of anything, so the mean itself is compared and no interval around it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memshare.config import GateConfig
from memshare.metrics.ir import ir_metrics, mean_metrics
from memshare.pool.store import PoolStore
from memshare.retrieval.gate import JUDGED_BY
from memshare.retrieval.serving import Query, Serving


class CanaryError(ValueError):
    """A file of canaries that can't be used; the message names file and line."""


@dataclass(frozen=True, slots=True)
class Canary:
    """A question to ``pool``, and the ids of the memories that answer it."""

    pool: str
    question: str
    relevant: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CanaryResult:
    """``failures``: why the next generation is refused; none: it isn't."""

    failures: tuple[str, ...]
    figures: Mapping[str, Any]


def read_canaries(path: Path) -> list[Canary]:
    """The canaries in a file. Raises `CanaryError`."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON has U+2028, too
    except (OSError, UnicodeDecodeError) as error:
        raise CanaryError(f"gate.canaries: {path} can't be read: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            pool, question, relevant = row["pool"], row["question"], row["relevant"]
            if not (isinstance(pool, str) and isinstance(question, str) and question.strip()):
                raise ValueError("pool and question must be texts")
            listed = isinstance(relevant, list) and all(isinstance(id, str) for id in relevant)
            if not (relevant and listed):
                raise ValueError("relevant must be a list of ids")
        except (ValueError, KeyError, TypeError) as error:
            raise CanaryError(f"gate.canaries: {path}:{number}: {error!r}") from error
        found.append(Canary(pool, question, tuple(relevant)))
    if not found:
        raise CanaryError(f"gate.canaries: {path} has none in it")
    return found


def judge_canaries(
    store: PoolStore,
    config: GateConfig,
    canaries: Sequence[Canary],
    rivals: Mapping[str, Serving],
) -> CanaryResult:
    """Compare ``rivals["next"]`` with all others on ``canaries``; all must be caught up.

    Memories deleted or on hold by now are no longer relevant, and questions of which none is left
    are left out. Where that leaves no question at all the generation is refused: a check that was
    asked for and can't be made is no pass.
    """
    ids = [id for canary in canaries for id in canary.relevant]
    living = {id for id, memory in store.get_many(ids).items() if not memory.held}
    usable = {
        str(number): canary
        for number, canary in enumerate(canaries)
        if canary.pool in rivals["next"].shards and living & set(canary.relevant)
    }
    if not usable:
        reason = f"none of the {len(canaries)} canaries has a relevant memory left: renew them"
        return CanaryResult((reason,), {"questions": 0})
    qrels = {
        name: dict.fromkeys(sorted(living & set(canary.relevant)), 1)
        for name, canary in usable.items()
    }
    queries = [Query(canary.pool, canary.question, config.depth) for canary in usable.values()]
    means = {}
    for name, rival in rivals.items():
        answers = rival.answer(queries)
        run = {
            key: [hit.id for hit in found.hits] for key, found in zip(usable, answers, strict=True)
        }
        means[name] = mean_metrics(ir_metrics(run, qrels))
    failures = [
        f"canaries: {metric} against {name}: {means['next'][metric] - mean[metric]:+.4f} is below "
        f"{-config.margin:+.4f}"
        for name, mean in means.items()
        for metric in JUDGED_BY
        if means["next"][metric] - mean[metric] < -config.margin
    ]
    return CanaryResult(tuple(failures), {"questions": len(usable), **means})
