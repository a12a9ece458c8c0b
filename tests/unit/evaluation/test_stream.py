"""A simulated pool under a cap: what searches leave behind, and what the policies make of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from memshare.evaluation.data import Pair
from memshare.evaluation.material import as_memories
from memshare.evaluation.stream import Observed, Stream, survivors
from memshare.pruning.policies import POLICIES
from memshare.records import Memory


def stream_of(angles: Sequence[float], scores: Sequence[float | None] = ()) -> Stream:
    """Memories on a half circle: the nearer two angles (degrees), the more alike."""
    memories = as_memories("pool", [Pair(f"question {n}", f"answer {n}")
                                    for n in range(len(angles))])  # fmt: skip
    graded = [
        replace(memory, score=score)
        for memory, score in zip(memories, scores or [None] * len(angles), strict=True)
    ]
    turned = np.radians(np.array(angles))
    rows = np.stack([np.cos(turned), np.sin(turned)], axis=1).astype(np.float32)
    return Stream(graded, rows, rows, None)


def left(stream: Stream, policy: str, cap: int, **settings: object) -> list[int]:
    """The places in the stream of what is left by ``policy``."""
    options = {"seeds": 1, "threshold": 60.0, "shots": 1, "batch": 1, **settings}
    found = asyncio.run(survivors(stream, cap=cap, policy=POLICIES[policy], **options))  # type: ignore[arg-type]
    return [memory.seq - 1 for memory in found]


def test_a_search_finds_the_nearest_living_memories_and_no_copy_of_the_question() -> None:
    stream = stream_of([0, 35, 10, 20, 0])
    stream = replace(stream, memories=[*stream.memories[:4], replace(
        stream.memories[4], prompt="QUESTION  0")])  # fmt: skip
    seen = Observed(stream, 60.0)
    seen.arrive([0, 1, 2])
    assert seen.search([4, 3], 2) == [[2, 1], [2, 1]]
    assert seen.search([3], 9) == [[2, 1, 0]]
    seen.arrive([3])
    seen.hold(3, POLICIES["age"])  # prunes to 5 % below the cap, as the loop does
    assert seen.alive == [2, 3]
    assert seen.search([4], 9) == [[2, 3]]


def test_nothing_goes_while_the_cap_is_not_exceeded() -> None:
    assert left(stream_of([0, 10, 20]), "age", 3) == [0, 1, 2]


def test_the_cap_is_held_along_the_way_and_never_empties_the_pool() -> None:
    assert left(stream_of(range(0, 90, 3)), "age", 1) == [29]
    assert left(stream_of(range(0, 90, 3)), "age", 10, batch=4) == list(range(20, 30))


def test_score_keeps_the_best_graded_and_takes_no_grade_for_just_admitted() -> None:
    stream = stream_of(range(0, 60, 10), [90.0, None, 20.0, 80.0, 59.0, 61.0])
    assert left(stream, "score", 4) == [0, 1, 3, 5]


def test_use_keeps_what_is_found() -> None:
    # The first memory is nearest to whatever comes; what comes later is far from everything else.
    stream = stream_of([0, 80, -80, 70, -70, 60])
    assert 0 in left(stream, "use", 3)
    assert 0 not in left(stream, "age", 3)


def test_the_clock_of_the_stream_tells_old_from_new() -> None:
    """Unused memories of a day ago go before those of just now: use is counted per day."""
    stream = stream_of([0.01 * n for n in range(60)])
    seen = Observed(stream, 60.0)
    seen.arrive(range(60))
    seen.hold(20, POLICIES["use"])
    assert seen.alive == list(range(41, 60))


def test_feedback_lets_go_of_what_askers_are_against() -> None:
    stream = stream_of([0, 10, 1, 11, 2, 12])
    bad = stream.memories[0].id

    def vote(shown: Memory, asked: Memory) -> float:
        return -1.0 if shown.id == bad else 1.0

    kept = left(replace(stream, votes=vote), "feedback", 5, shots=3)
    assert 0 not in kept
    with_no_votes = left(stream, "feedback", 5, shots=3)
    assert with_no_votes == [2, 3, 4, 5]  # of equals the oldest go


def test_usefulness_keeps_what_made_answers_likelier() -> None:
    stream = stream_of(range(0, 60, 10))
    asked: list[tuple[int, int]] = []

    async def gain(shown: Memory, arriving: Memory) -> float | None:
        asked.append((shown.seq, arriving.seq))
        return None if arriving.seq == 2 else (1.0 if shown.seq == 2 else -1.0)

    kept = left(stream, "usefulness", 4, shots=2, gain=gain)
    assert 1 in kept and 0 not in kept
    assert (1, 2) in asked and all(shown < arriving for shown, arriving in asked)


def test_near_duplicates_leaves_one_of_each_pair() -> None:
    stream = stream_of([0, 1, 30, 31, 60, 61], [50.0, 90.0, 90.0, 50.0, 90.0, 50.0])
    assert left(stream, "near-duplicates", 3, batch=5) in ([1, 2], [1, 4], [2, 4])


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_holds_every_cap(policy: str) -> None:
    stream = stream_of(range(0, 90, 3))
    for cap in (1, 7, 29):
        kept = left(stream, policy, cap, batch=8)
        assert cap >= len(kept) >= 1 and len(set(kept)) == len(kept)
