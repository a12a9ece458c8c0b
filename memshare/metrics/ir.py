"""Retrieval metrics per query, computed by ir-measures (the field's reference implementations)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

import ir_measures
from ir_measures import RR, P, R, nDCG

METRICS = ("P@1", "MRR@10", "nDCG@10", "recall@10")  # what reports show
MORE_RECALL = ("recall@1", "recall@3")  # of the useful memories: what one and three shots show
_MEASURES = {
    "P@1": P @ 1, "MRR@10": RR @ 10, "nDCG@10": nDCG @ 10, "recall@10": R @ 10,
    "recall@1": R @ 1, "recall@3": R @ 3,
}  # fmt: skip


def ir_metrics(
    runs: Mapping[str, Sequence[str]],
    qrels: Mapping[str, Mapping[str, int]],
    metrics: Sequence[str] = METRICS,
) -> dict[str, dict[str, float]]:
    """The ``metrics`` of each query.

    ``runs``: query id -> document ids, best first. ``qrels``: query id -> document id -> grade
    (0 or absent: not relevant). Every query of ``runs`` gets a row; one without any relevant
    document, or without results, scores 0 everywhere. Returns query id -> metric -> value.
    """
    names = {_MEASURES[metric]: metric for metric in metrics}
    rows = {query: dict.fromkeys(metrics, 0.0) for query in runs}
    judged = {query: dict(qrels[query]) for query in runs if any(qrels.get(query, {}).values())}
    scored = {
        # Descending scores by rank: the order given is the order judged, ties can't reshuffle it.
        query: {document: float(-rank) for rank, document in enumerate(runs[query])}
        for query in judged
        if runs[query]
    }
    if scored:
        for found in ir_measures.iter_calc(list(names), judged, scored):
            if found.query_id in rows:
                rows[found.query_id][names[found.measure]] = float(found.value)
    return rows


def mean_metrics(
    per_query: Mapping[str, Mapping[str, float]], metrics: Sequence[str] = METRICS
) -> dict[str, float]:
    """Mean of each of the ``metrics`` over queries; all zero for no queries."""
    if not per_query:
        return dict.fromkeys(metrics, 0.0)
    return {metric: fmean(row[metric] for row in per_query.values()) for metric in metrics}
