"""How far answers agree: the Jaccard similarity of their words, estimated by MinHash.

A signature holds the least value of each of many hash functions over an answer's words; two answers
share each with the probability of their words' Jaccard similarity (Broder 1997, "On the resemblance
and containment of documents"). So comparing two answers costs the same however long they are, and
any number of them fits in memory.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from memshare.training.split import grams

HASHES = 128  # an estimate's standard error is at most 0.044

Signatures = npt.NDArray[np.uint32]


def signatures(answers: Iterable[str]) -> Signatures:
    """MinHash signatures (answers, `HASHES`); texts that are equal once normalised share theirs."""
    draw = np.random.default_rng(0)
    factors = draw.integers(2**64, size=HASHES, dtype=np.uint64) | np.uint64(1)
    shifts = draw.integers(2**64, size=HASHES, dtype=np.uint64)

    def signature(answer: str) -> Signatures:
        words = np.frombuffer(grams(answer, size=1), dtype=np.uint64)
        hashed: npt.NDArray[np.uint64] = words[:, None] * factors + shifts  # modulo 2**64
        least: Signatures = (hashed.min(axis=0) >> np.uint64(32)).astype(np.uint32)
        return least

    rows = [signature(answer) for answer in answers]
    return np.stack(rows) if rows else np.empty((0, HASHES), np.uint32)


def agreement(one: Signatures, other: Signatures) -> npt.NDArray[np.float64]:
    """0 to 1, over the last axis of two arrays of signatures that broadcast."""
    shared: npt.NDArray[np.float64] = (one == other).mean(axis=-1)
    return shared
