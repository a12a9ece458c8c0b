"""ROUGE-L (Lin 2004), by Google's rouge-score package."""

from __future__ import annotations

from functools import lru_cache
from typing import Any


@lru_cache(maxsize=1)
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # loads nltk
    from rouge_score.tokenizers import DefaultTokenizer

    # Given, not left to its default: that one announces itself, which sets up the root logger.
    return RougeScorer(["rougeL"], tokenizer=DefaultTokenizer(use_stemmer=True))


def rouge_l(candidate: str, reference: str) -> float:
    """F1 of the longest common subsequence of stemmed English words, in 0..1."""
    return float(_scorer().score(reference, candidate)["rougeL"].fmeasure)
