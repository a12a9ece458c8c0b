"""Leave-one-out values: by brute force, and on pools where it is clear what should go."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from memshare.pruning.agreement import agreement, signatures
from memshare.pruning.evidence import Entry, Evidence
from memshare.pruning.leave_one_out import (
    DEPTH,
    OWN,
    by_leave_one_out,
    contributions,
    leave_one_out_values,
)
from memshare.training.split import grams, jaccard

WORDS = ["river", "stone", "lamp", "wolf", "paper", "green", "cloud", "salt", "clock", "bread"]


def dcg(gains: np.ndarray) -> float:
    return float(sum(gain / np.log2(rank + 2) for rank, gain in enumerate(gains[:DEPTH])))


@pytest.mark.parametrize("ranks", [1, 3, 10, 11])
def test_a_contribution_is_what_dcg_loses_when_the_entry_alone_is_left_out(ranks: int) -> None:
    gains = np.random.default_rng(ranks).random((5, ranks))
    wanted = [[dcg(row) - dcg(np.delete(row, rank)) for rank in range(ranks)] for row in gains]
    assert contributions(gains) == pytest.approx(np.array(wanted))


def test_what_stands_beyond_the_eleventh_counts_for_nothing() -> None:
    gains = np.random.default_rng(0).random((3, 14))
    values = contributions(gains)
    assert values[:, :11] == pytest.approx(contributions(gains[:, :11]))
    assert not values[:, 10:].any()


def test_agreement_estimates_the_jaccard_similarity_of_the_words() -> None:
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(WORDS, size=size)) for size in rng.integers(1, 12, size=60)]
    exact = [[jaccard(grams(a, 1), grams(b, 1)) for b in texts] for a in texts]
    signed = signatures(texts)
    error = agreement(signed[:, None], signed[None]) - np.array(exact)
    assert np.abs(error).max() < 5 * 0.045 and abs(error.mean()) < 0.01


def test_equal_answers_agree_wholly_and_others_without_a_common_word_not_at_all() -> None:
    signed = signatures(["Card_Arrival", "card arrival ", "a lost cheque", "?!", "?!", "…"])
    assert agreement(signed[0], signed[1:3]).tolist() == [1.0, 0.0]
    assert agreement(signed[3], signed[4:]).tolist() == [1.0, 0.0]
    assert signatures([]).shape == (0, 128)


@pytest.mark.parametrize("count", [1, 7, 12, 40])
def test_values_are_what_all_rankings_lose_a_memorys_own_question_counting_more(count: int) -> None:
    rng = np.random.default_rng(count)
    rows = rng.normal(size=(2, count, 8)).astype(np.float32)
    questions, vectors = rows / np.linalg.norm(rows, axis=2, keepdims=True)
    answers = signatures(" ".join(rng.choice(WORDS, size=3)) for _ in range(count))
    left = np.flatnonzero(rng.random(count) < 0.8) if count > 1 else np.array([0])
    wanted = np.zeros(count)
    for question in range(count):
        ranked = sorted(left.tolist(), key=lambda row: -float(vectors[row] @ questions[question]))
        others = [row for row in ranked if row != question]
        gains = agreement(answers[others], answers[question]) if others else np.zeros(0)
        for rank, row in enumerate(others):
            wanted[row] += dcg(gains) - dcg(np.delete(gains, rank))
        wanted[question] += OWN * (dcg(np.array([1.0, *gains])) - dcg(gains))
    values, _ = leave_one_out_values(questions, vectors, answers, left)
    assert values[left] == pytest.approx(wanted[left])


def pool_of(
    memories: list[tuple[float, str]], cap: int = 0, scores: dict[int, float] | None = None
) -> Any:
    """Memories on a half circle, by angle (degrees) and answer; a question is where its own is."""
    turned = np.radians(np.array([angle for angle, _ in memories]))
    rows = np.stack([np.cos(turned), np.sin(turned)], axis=1).astype(np.float32)
    entries = [Entry(f"{n}", n, (scores or {}).get(n), "") for n in range(len(memories))]
    evidence = SimpleNamespace(
        entries=entries, vectors=rows, questions=rows, threshold=60.0,
        answers=signatures(answer for _, answer in memories), excess=len(memories) - cap,
    )  # fmt: skip
    evidence.grade = lambda entry: Evidence.grade(evidence, entry)
    return evidence


def test_what_its_neighbours_contradict_goes_first() -> None:
    crowd = [(float(n), "yes indeed") for n in range(30)]
    assert by_leave_one_out(pool_of([*crowd, (6.5, "wrong")], 16))[0] == "30"


def test_what_nothing_else_says_stays_though_it_stands_in_the_way_of_some() -> None:
    crowd = [(float(n), "yes indeed") for n in range(30)]
    gone = by_leave_one_out(pool_of([*crowd, (38.0, "a rare one")], 16))[:15]
    assert "30" not in gone


def test_of_one_answer_said_often_some_go_before_any_that_is_said_seldom() -> None:
    often = [(n / 10, "often said") for n in range(30)]
    seldom = [(60.0 + n, "seldom said") for n in range(3)]
    gone = by_leave_one_out(pool_of([*often, *seldom], cap=18))[:15]
    assert all(int(id_) < 30 for id_ in gone)


def test_what_is_said_often_is_not_forgotten_altogether() -> None:
    """Each of fifteen alone is worth nothing, and all of them are no more than a fifth."""
    often = [(n / 10, "often said") for n in range(15)]
    seldom = [(20.0 + 5 * n + m / 10, f"subject {n}") for n in range(30) for m in range(3)]
    gone = by_leave_one_out(pool_of([*often, *seldom], cap=90))[:15]
    assert 0 < sum(int(id_) < 15 for id_ in gone) < 15


def test_of_equals_the_worse_graded_goes_first() -> None:
    same = [(0.0, "same")] * 14
    assert by_leave_one_out(pool_of(same, 12, {5: 10.0, 3: 99.0, 7: 20.0}))[:2] == ["5", "7"]


@pytest.mark.parametrize("count", [0, 1, 2, 12])
def test_pools_smaller_than_a_ranking_are_ranked(count: int) -> None:
    pool = pool_of([(10.0 * n, f"answer {n}") for n in range(count)])
    assert sorted(by_leave_one_out(pool), key=int) == [f"{n}" for n in range(count)]
