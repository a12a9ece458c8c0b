"""What the answers to the pool's own questions would lose without a memory: leave-one-out values.

Each memory's prompt is a question that was really asked, and its answer says what should be found
for it. So the pool is searched with its own questions, the question's own memory left out, and what
is found counts as relevant as far as its answer agrees (`agreement`). A memory's value is what the
DCG@10 of all these rankings together loses when it alone goes and what stands below moves up
(leave-one-out valuation, as for the training data of nearest-neighbour models in Jia et al. 2019,
"Efficient task-specific data valuation for nearest neighbor algorithms"). It is negative for a
memory that stands before better ones, as wrong answers do (what Wilson's editing rule of 1972
drops), about 0 for one whose neighbours say the same (what Hart's condensing rule of 1968 drops),
and high for one that nothing can replace.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from memshare.arrays import Floats, Ints
from memshare.pruning.agreement import Signatures, agreement
from memshare.pruning.evidence import Evidence
from memshare.retrieval.index import FlatIndex

DEPTH = 10
# How often a memory's own question counts, as if it were asked again: for what nobody else asked
# about, nothing else speaks. With none rare subjects go first, with more wrong answers stay; chosen
# on Banking77's training questions, with and without rare intents and false labels.
OWN = 3.0
_STEP = 0.2  # the share that goes before what is left is valued anew
_SAME = 0.5  # from this agreement on an answer stands in for another
_QUERIES = 1024  # searched at a time
_DISCOUNTS = 1 / np.log2(np.arange(2, DEPTH + 2))

Values = npt.NDArray[np.float64]


def contributions(gains: Values) -> Values:
    """What the DCG@10 of each ranking loses without each of its entries.

    ``gains`` (rankings, ranks): best first; 0 follows where fewer than 11 are given. Of the same
    shape: entries beyond the tenth add nothing.
    """
    padded = np.zeros((len(gains), DEPTH + 1))
    width = min(gains.shape[1], DEPTH + 1)
    padded[:, :width] = gains[:, :width]
    drops = (padded[:, :-1] - padded[:, 1:]) * _DISCOUNTS  # at a rank, when what follows moves up
    values = np.zeros_like(gains)
    values[:, : min(width, DEPTH)] = drops[:, ::-1].cumsum(axis=1)[:, ::-1][:, :width]
    return values


def by_leave_one_out(evidence: Evidence) -> list[str]:
    """The least valuable to the pool's own questions first, of equals the worse graded.

    The questions of those that go are asked on. A fifth at a time goes at most, then the others are
    valued again, until `Evidence.excess` have gone: that one of many that say the same is worth
    nothing does not hold of all of them together.
    """
    grades = [evidence.grade(entry) for entry in evidence.entries]
    left = np.array(sorted(range(len(grades)), key=grades.__getitem__), dtype=np.int64)
    order: list[int] = []
    while len(order) < evidence.excess:
        values, stand_ins = leave_one_out_values(
            evidence.questions, evidence.vectors, evidence.answers, left
        )
        ranked = left[np.argsort(values[left], kind="stable")]
        most = min(max(1, int(_STEP * len(left))), evidence.excess - len(order))
        going = leaving(ranked.tolist(), stand_ins, most)
        order += going
        left = left[~np.isin(left, going)]
    return [evidence.entries[row].id for row in [*order, *left.tolist()]]


def leaving(ranked: Sequence[int], stand_ins: Ints, most: int) -> list[int]:
    """The first ``most`` of ``ranked`` of whose ``stand_ins`` half at least stay."""
    going: dict[int, None] = {}
    for row in ranked:
        if len(going) == most:
            break
        others = [other for other in stand_ins[row].tolist() if other >= 0]
        if 2 * sum(other in going for other in others) <= len(others):
            going[row] = None
    return list(going)


def leave_one_out_values(
    questions: Floats,
    vectors: Floats,
    answers: Signatures,
    left: Ints,
) -> tuple[Values, Ints]:
    """The value (n,) of each memory in rows ``left`` of ``vectors``, and its stand-ins (n, ranks).

    Those are what is found for its own question and agrees with its answer by half at least, others
    are -1. Both are meaningless for memories that are not left. ``questions``, ``vectors`` (n,
    dim), ``answers`` (n, `HASHES`): of all memories, gone ones, too.
    """
    index = FlatIndex.build(vectors[left])
    values = np.zeros(len(vectors))
    stand_ins = np.full((len(vectors), min(DEPTH, len(left))), -1)
    for start in range(0, len(questions), _QUERIES):
        asked = np.arange(start, min(start + _QUERIES, len(questions)))
        _, places = index.search(questions[asked], min(DEPTH + 2, len(left)))
        found = left[places]
        # The question's own memory goes to the end of its ranking, where it adds nothing.
        own = found == asked[:, None]
        found = np.take_along_axis(found, np.argsort(own, axis=1, kind="stable"), axis=1)
        gains = agreement(answers[found], answers[asked, None])
        gains[found == asked[:, None]] = 0.0
        np.add.at(values, found, contributions(gains))
        again = np.concatenate([np.ones((len(asked), 1)), gains], axis=1)
        values[asked] += OWN * contributions(again)[:, 0]
        stand_ins[asked] = np.where(gains >= _SAME, found, -1)[:, :DEPTH]
    return values, stand_ins
