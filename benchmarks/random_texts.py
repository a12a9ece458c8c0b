"""Random texts of realistic lengths, and training items made of them, for benchmarks of speed."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from memshare.retrieval.encoder import Encoder
from memshare.training.select import Passage, Selected, text_key

SIGMA = 0.6  # of the logarithm of a text's length


def words_of(encoder: Encoder) -> list[str]:
    """Words of one token each."""
    words = encoder.tokenizer.get_vocab()
    return sorted(word for word in words if word.isalpha() and word.isascii())


def random_text(
    draw: random.Random, words: Sequence[str], middle: float, least: int, most: int
) -> str:
    """Random ``words``, as many as a log-normal length with median ``middle`` says."""
    length = round(draw.lognormvariate(0.0, SIGMA) * middle)
    return " ".join(draw.choices(words, k=min(max(length, least), most)))


def selected(rows: Iterable[tuple[str, str, Sequence[str]]]) -> list[Selected]:
    """Queries, each with its positive and its hard negatives, as the trainer's own items."""

    def passage(text: str, name: str) -> Passage:
        return Passage(name, text, text_key(text), name)

    return [
        Selected(
            query_id=str(i), query=query, pool="main", principal=None, round=1, answer=f"own {i}",
            positives=(passage(positive, f"positive {i}"),),
            negatives=tuple(passage(text, f"negative {i} {n}") for n, text in enumerate(negatives)),
            never_negative=frozenset(),
        )
        for i, (query, positive, negatives) in enumerate(rows)
    ]  # fmt: skip
