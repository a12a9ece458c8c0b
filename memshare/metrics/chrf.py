"""chrF (Popović 2015), a character n-gram F-score: for text that an English model can't read."""

from __future__ import annotations

from collections import Counter

ORDER = 6
BETA = 2.0  # recall counts twice as much as precision, as in the paper


def chrf(candidate: str, reference: str) -> float:
    """Sentence chrF in 0..1, as sacreBLEU computes it (there times 100).

    White space is left out; precision and recall are averaged over the orders 1..6 for which both
    texts are long enough. A text without characters on either side scores 0.
    """
    ours, theirs = "".join(candidate.split()), "".join(reference.split())
    orders = range(1, min(ORDER, len(ours), len(theirs)) + 1)
    if not orders:
        return 0.0
    precision = recall = 0.0
    for n in orders:
        found, wanted = _grams(ours, n), _grams(theirs, n)
        common = (found & wanted).total()
        precision += common / found.total() / len(orders)
        recall += common / wanted.total() / len(orders)
    if precision + recall == 0.0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall)


def _grams(text: str, n: int) -> Counter[str]:
    return Counter(text[start : start + n] for start in range(len(text) - n + 1))
