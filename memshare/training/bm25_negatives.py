"""Hard negatives for a data set that has few or none: what BM25 finds, and nobody named.

As in DPR (Karpukhin et al. 2020, "Dense Passage Retrieval for Open-Domain Question Answering"). A
text that answers a query though nobody said so is taken for wrong: where a data set has many of
these, such negatives do harm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from memshare.config import BM25Config
from memshare.progress import track
from memshare.records import Candidate, Example, answer_key
from memshare.retrieval.bm25 import BM25
from memshare.training.examples import read_shard, write_shard
from memshare.training.select import text_key

_WRONG = -1.0  # as `imported` labels a negative that nobody scored


def add_negatives(
    shards: Sequence[Path], beside: Sequence[Path], count: int, config: BM25Config
) -> int:
    """Fill the negatives of each example in ``shards`` up to ``count``; returns how many came in.

    They are texts of these shards and of those ``beside``, the best by BM25 first, after the
    example's own. Never what any row names as an answer to the same question, or the question. One
    is worth as little as the worst that its row has. All texts are in memory.
    """
    texts: dict[str, str] = {}
    answers: dict[str, set[str]] = {}
    for example in _read([*shards, *beside]):
        for candidate in example.candidates:
            key = text_key(candidate.text)
            texts.setdefault(key, candidate.text)
            if _worth(candidate) >= 0.0:
                answers.setdefault(text_key(example.query), set()).add(key)
    index = BM25(config).fit(list(texts), list(texts.values()))
    added = 0
    for path in track(shards, "BM25 negatives"):
        filled = []
        for example in read_shard(path):
            question = text_key(example.query)
            known = {text_key(candidate.text) for candidate in example.candidates}
            worst = min(_WRONG, *(_worth(candidate) for candidate in example.candidates))
            lacking = count - sum(_worth(candidate) < 0.0 for candidate in example.candidates)
            never = known | answers.get(question, set()) | {question}
            [found] = index.top([example.query], max(0, lacking), [never])
            more = tuple(
                Candidate(key, texts[key], rank, worst, answer_key(texts[key]))
                for rank, (key, score) in enumerate(found)
                if score > 0.0
            )
            added += len(more)
            filled.append(replace(example, candidates=example.candidates + more))
        write_shard(path, filled)
    return added


def _read(shards: Sequence[Path]) -> Iterator[Example]:
    return (example for path in shards for example in read_shard(path))


def _worth(candidate: Candidate) -> float:
    assert candidate.loglik is not None  # a data set's labels
    return candidate.loglik
