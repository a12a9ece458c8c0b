"""The gate: a new generation serves only if held-out questions show that it is not worse.

Each held-out memory's prompt is searched with BM25, the current generation, the next one and the
best so far. The union of what they return is judged, so no retriever decides alone what could count
as relevant (pooling, Spärck Jones & van Rijsbergen 1975). The next one passes if the lower bound of
the paired bootstrap of its nDCG@10 and MRR@10 difference stays above -margin against the current
generation and against the best so far: many small losses in a row can't add up.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from memshare.config import GateConfig
from memshare.metrics.ir import ir_metrics, mean_metrics
from memshare.metrics.stats import paired_bootstrap
from memshare.records import Memory

JUDGED_BY = ("nDCG@10", "MRR@10")
GRADES = 3

PerQuery = Mapping[str, Mapping[str, float]]
Runs = Mapping[str, Sequence[str]]  # query id -> memory ids, best first


class Sample(NamedTuple):
    """One memory that a retriever found for a held-out question, for people to look at."""

    question: str
    retriever: str
    rank: int  # from 1
    memory: str
    gain: float


@dataclass(frozen=True, slots=True)
class GateResult:
    """The verdict. ``queries`` were judged; ``best`` goes to `publish`.

    ``best``: the number of the earlier generation that is better than the next one (0: the
    configured encoder); None: none is.
    ``figures``: means of each retriever and the intervals of the differences, for metrics.json.
    ``samples`` are texts, so they are for nobody but who asked for them.
    """

    passed: bool
    reason: str
    queries: int
    best: int | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()

    def record(self) -> dict[str, Any]:
        """The ``gate`` entry of metrics.json."""
        return {
            "passed": self.passed,
            "reason": self.reason,
            "queries": self.queries,
            **self.figures,
        }


def choose_queries(memories: Sequence[Memory], limit: int, seed: int) -> list[Memory]:
    """At most ``limit`` of ``memories``, by a hash of seed and id; stable as the pool grows."""

    def key(memory: Memory) -> str:
        return hashlib.sha256(f"{seed}:{memory.id}".encode()).hexdigest()

    return sorted(memories, key=key)[:limit]


def grades(gains: Sequence[float], threshold: float) -> list[int]:
    """Relevance grades 0..3 of one query's candidates.

    A gain (nats per token over no example, or 1 for a true label) of at most ``threshold`` is 0;
    the others get the third of the best gain in which they fall: 3 for the top third, then 2, 1.
    """
    best = max(gains, default=0.0)
    return [
        0 if gain <= threshold else max(1, math.ceil(GRADES * gain / best - 1e-9)) for gain in gains
    ]


def judge(
    runs: Mapping[str, Runs], gains: Mapping[str, Mapping[str, float]], threshold: float
) -> dict[str, PerQuery]:
    """Metrics per query of each retriever in ``runs``, on the same judgements.

    ``gains``: query id -> memory id -> gain, for the union of what the runs return. Queries for
    which nothing relevant was found by anyone tell nothing about the difference and are left out.
    """
    qrels = {}
    for query, by_id in gains.items():
        graded = grades(list(by_id.values()), threshold)
        if any(graded):
            qrels[query] = dict(zip(by_id, graded, strict=True))
    return {
        name: ir_metrics({query: run[query] for query in qrels}, qrels)
        for name, run in runs.items()
    }


def decide(
    current: PerQuery, following: PerQuery, best: PerQuery | None, config: GateConfig, seed: int
) -> GateResult:
    """Compare the next generation's metrics per query with the current and the best so far.

    All must be over the same queries; ``best`` None: it is the current one. Raises ValueError for
    different queries.
    """
    rivals = {"current": current} | ({} if best is None else {"best": best})
    for name, rival in rivals.items():
        if set(rival) != set(following):
            raise ValueError(f"the gate needs the same queries for next and {name}")
    if not following:
        return GateResult(True, "no held-out queries", 0)
    order = sorted(following)
    differences: dict[str, dict[str, dict[str, float]]] = {}
    failures = []
    for name, rival in rivals.items():
        differences[name] = {}
        for metric in JUDGED_BY:
            interval = paired_bootstrap(
                [following[query][metric] for query in order],
                [rival[query][metric] for query in order],
                resamples=config.resamples,
                confidence=config.confidence,
                seed=seed,
            )
            differences[name][metric] = interval._asdict()
            if not interval.low > -config.margin:
                failures.append(
                    f"{metric} against {name}: {interval.mean:+.4f}, lower bound "
                    f"{interval.low:+.4f} is not above {-config.margin:+.4f}"
                )
    figures = {
        "next": mean_metrics(following),
        **{name: mean_metrics(rival) for name, rival in rivals.items()},
        "differences": differences,
        "margin": config.margin,
        "confidence": config.confidence,
    }
    reason = "; ".join(failures) or "not worse than the current and the best so far"
    return GateResult(not failures, reason, len(following), figures=figures)
