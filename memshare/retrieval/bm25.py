"""BM25+ (Lv & Zhai 2011) over a pool's memories: rank-bm25 as the reference, bm25s for large pools.

Both backends get the same token ids and give the same scores (Trotman et al. 2014's form, idf
``ln((N + 1) / df)``); rankings are equal too, ties going to the smaller id. A term that a query
repeats counts each time; one that no memory holds counts nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from memshare.config import BM25Config
from memshare.retrieval.text import tokenize

# The backends add terms in different orders; rounding the last bits away keeps equal scores equal,
# so that ties fall to ids and not to rounding.
_DECIMALS = 9


class BM25:
    """BM25+ over texts with ids. Searches may run in several threads; `fit` must not."""

    def __init__(self, config: BM25Config) -> None:
        """An empty index; `fit` fills it."""
        self.config = config
        self._ids: list[str] = []  # ascending: the first of equal scores has the smallest id
        self._row: dict[str, int] = {}  # id -> row of _ids
        self._vocabulary: dict[str, int] = {}
        self._backend: Any = None

    def fit(self, ids: Sequence[str], texts: Sequence[str]) -> BM25:
        """Index ``texts`` under ``ids``, replacing what was there; returns itself.

        Raises ValueError for a repeated id or lists of different lengths.
        """
        if len(ids) != len(texts):
            raise ValueError(f"{len(ids)} ids for {len(texts)} texts")
        order = sorted(range(len(ids)), key=ids.__getitem__)
        self._ids = [ids[i] for i in order]
        self._row = {name: row for row, name in enumerate(self._ids)}
        if len(self._row) != len(ids):
            twice = next(a for a, b in zip(self._ids, self._ids[1:], strict=False) if a == b)
            raise ValueError(f"id {twice!r} is given twice")
        vocabulary: dict[str, int] = {}
        corpus = [
            [vocabulary.setdefault(token, len(vocabulary)) for token in tokenize(texts[i])]
            for i in order
        ]
        self._vocabulary = vocabulary
        # Without a single word there is no average length to divide by; every score is 0.
        self._backend = self._build(corpus) if vocabulary else None
        return self

    def _build(self, corpus: list[list[int]]) -> Any:
        c = self.config
        if c.backend == "rank-bm25":
            from rank_bm25 import BM25Plus

            reference = BM25Plus(corpus, k1=c.k1, b=c.b, delta=c.delta)
            # With b = 1 an empty document would be 0 / 0; its length plays no other part.
            reference.doc_len = [max(length, 1) for length in reference.doc_len]
            return reference
        import bm25s

        fast = bm25s.BM25(k1=c.k1, b=c.b, delta=c.delta, method="bm25+", dtype="float64")
        fast.index(
            (corpus, {i: i for i in range(len(self._vocabulary))}),
            create_empty_token=False,
            show_progress=False,
        )
        return fast

    def _scores(self, query: str) -> np.ndarray:
        """BM25+ score of each text, (n_docs,) float64, by row, that is by ascending id."""
        known = [self._vocabulary[t] for t in tokenize(query) if t in self._vocabulary]
        if self._backend is None or not known:
            return np.zeros(len(self._ids))
        if self.config.backend == "rank-bm25":
            raw = self._backend.get_scores(known)
        else:
            raw = self._backend.get_scores_from_ids(known)
        return np.round(np.asarray(raw, dtype=np.float64), _DECIMALS)

    def top(
        self, queries: Sequence[str], n: int, exclude: Sequence[Collection[str]] | None = None
    ) -> list[list[tuple[str, float]]]:
        """For each query the best ``n`` (id, score), best first, ties by id ascending.

        ``exclude`` gives ids to leave out, one collection a query; ids that are not indexed are
        ignored. Fewer than ``n`` come back only where fewer are left. In BM25+ every text has a
        score, so a query whose words are all unknown gets the smallest ids with score 0.
        """
        if n < 0:
            raise ValueError(f"n must not be negative, got {n}")
        if exclude is not None and len(exclude) != len(queries):
            raise ValueError(f"{len(exclude)} exclusions for {len(queries)} queries")
        results = []
        for position, query in enumerate(queries):
            scores = self._scores(query)
            for name in exclude[position] if exclude is not None else ():
                if name in self._row:
                    scores[self._row[name]] = -np.inf
            results.append([(self._ids[row], float(scores[row])) for row in _best(scores, n)])
        return results


def _best(scores: np.ndarray, n: int) -> np.ndarray:
    """Rows of the ``n`` highest finite ``scores``, descending, equal ones by row; exact.

    Linear in the scores: only the winners are sorted.
    """
    if n == 0:
        return np.empty(0, dtype=np.int64)
    if n < len(scores):
        edge = np.partition(scores, len(scores) - n)[len(scores) - n]
        above = np.flatnonzero(scores > edge)
        level = np.flatnonzero(scores == edge)[: n - len(above)]
        rows = np.concatenate([above, level])  # equal scores stand in row order within each
    else:
        rows = np.arange(len(scores))
    rows = rows[np.isfinite(scores[rows])]
    best: np.ndarray = rows[np.argsort(-scores[rows], kind="stable")]
    return best
