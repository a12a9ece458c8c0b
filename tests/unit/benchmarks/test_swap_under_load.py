"""The check behind `mixed_answers`, and what counts as during a swap."""

from __future__ import annotations

import asyncio
from random import Random

import numpy as np
import pytest
import swap_under_load as bench
from gateway_overhead import _quantile
from http_load import Found, K, Load

from memshare.records import Hit, SearchAnswer
from tests.swapping import Expected

QUESTIONS, MEMORIES = 6, 200


def vectors(seed: int, count: int) -> np.ndarray:
    found = np.random.default_rng(seed).standard_normal((count, 16)).astype(np.float32)
    normal: np.ndarray = found / np.linalg.norm(found, axis=1, keepdims=True)
    return normal


def model(query: int, memory: int, late: int = 0) -> Expected:
    """Queries and memories by encoders of these numbers; ``late`` memories came meanwhile."""
    similarities = vectors(query, QUESTIONS) @ vectors(memory + 100, MEMORIES).T
    columns = {f"m{column}": column for column in range(MEMORIES)}
    return Expected(similarities, columns, MEMORIES - late)


def found(answer: SearchAnswer, question: int = 0, due: float = 0.0, done: float = 0.1) -> Found:
    return Found(question, due, done, answer)


def test_right_answers_pass_and_every_planted_fault_is_found() -> None:
    expected = {1: model(1, 1), 2: model(2, 2)}
    crossed = {1: model(1, 2), 2: model(2, 1)}
    right = [
        found(bench.answer_of(expected[number], number, question), question)
        for number in expected
        for question in range(QUESTIONS)
    ]
    assert bench.problems(right, expected) == []
    faults = bench.planted(right, expected, crossed)
    assert len(faults) == 4 * len(right)
    assert len(bench.problems(faults, expected)) == len(faults)


def test_a_memory_that_nobody_wrote_and_a_missing_one_are_found() -> None:
    expected = {1: model(1, 1), 2: model(2, 2)}
    hits = bench.answer_of(expected[1], 1, 0).hits
    strange = SearchAnswer(1, (*hits[:-1], Hit("nobody's", hits[-1].similarity)))
    assert "unknown memories" in bench.problems([found(strange)], expected)[0]
    row = expected[1].similarities[0]
    sixth = int(np.argsort(-row)[K])
    without_the_best = SearchAnswer(1, (*hits[1:], Hit(f"m{sixth}", float(row[sixth]))))
    assert "missing" in bench.problems([found(without_the_best)], expected)[0]


def test_what_came_meanwhile_may_be_missing_but_not_wrong() -> None:
    expected = {1: model(1, 1, late=MEMORIES), 2: model(2, 2)}
    row = expected[1].similarities[0]
    worst = np.argsort(row)[:K][::-1].tolist()
    hits = tuple(Hit(f"m{column}", float(row[column])) for column in worst)
    assert bench.problems([found(SearchAnswer(1, hits))], expected) == []
    hits = (*hits[:-1], Hit(hits[-1].id, hits[-1].similarity + 0.01))
    assert bench.problems([found(SearchAnswer(1, hits))], expected)


def test_a_search_that_overlaps_a_swap_is_during_it() -> None:
    load = Load([], "p", [], iter(()), Random(0))
    load.swaps = [(10.0, 11.0), (20.0, 21.0)]
    answer = SearchAnswer(1, ())
    times = [(1.0, 2.0), (9.0, 10.5), (10.2, 10.3), (10.9, 30.0), (12.0, 13.0)]
    load.found = [found(answer, due=due, done=done) for due, done in times]
    during, steady = bench.by_swap(load)
    assert during == pytest.approx([1.5, 0.1, 19.1]) and steady == pytest.approx([1.0, 1.0])


def test_quantiles_of_a_histogram_are_linear_within_a_bucket() -> None:
    counts = [(1.0, 10.0), (2.0, 30.0), (float("inf"), 30.0)]
    assert _quantile(counts, 0.5) == pytest.approx(1.25)
    assert _quantile(counts, 1.0) == 2.0


def test_a_request_that_ended_in_no_known_way_is_not_lost() -> None:
    """It is neither among the answers nor among the failures, of which there must be none."""
    load = Load([], "p", [], iter(()), Random(0))
    sent: list[float] = []

    async def one(due: float) -> None:
        sent.append(due)
        if len(sent) == 1:
            raise KeyError("memories")

    load._one = one  # type: ignore[method-assign]
    with pytest.raises(ExceptionGroup) as raised:
        asyncio.run(load.run(1000.0, lambda: len(sent) >= 5))
    assert raised.group_contains(KeyError)
