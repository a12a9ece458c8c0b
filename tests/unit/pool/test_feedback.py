"""Feedback: one opinion a principal, changeable, summed up, gone with its memory."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from memshare.pool.errors import InvalidMemory
from memshare.pool.feedback import Feedback, Standing
from memshare.pool.store import PoolStore
from memshare.records import NewMemory


def test_opinions_sum_up_and_a_later_one_replaces_the_first(url: str) -> None:
    with PoolStore.open(url) as store:
        store.create_pool("main")
        a, b, c = (r.id for r in store.append([NewMemory("main", p, "x") for p in "abc"]))
        feedback = Feedback(store.database)
        assert feedback.give(a, "ann", 1) == Standing(pytest.approx(1 / 3), 1)
        assert feedback.give(a, "ann", 1) == Standing(pytest.approx(1 / 3), 1)  # said twice
        assert feedback.give(a, "bob", 0.5, "useful") == Standing(pytest.approx(1.5 / 4), 2)
        assert feedback.give(a, "ann", -1) == Standing(pytest.approx(-0.5 / 4), 2)
        for number in range(20):
            feedback.give(b, f"agent {number}", 1)
        standings = feedback.standings([a, b, c, "unknown"])
        assert set(standings) == {a, b}
        assert standings[b].value > 0.9
        assert list(feedback.of_pool("main")) == [a, b]  # the worst first
        assert feedback.of_pool("main") == standings


def test_feedback_goes_with_its_memory(tmp_path: Path) -> None:
    with PoolStore.open(f"sqlite:///{tmp_path}/pool.db") as store:
        store.create_pool("main")
        (added,) = store.append([NewMemory("main", "p", "x")])
        feedback = Feedback(store.database)
        feedback.give(added.id, "ann", -1, "it quotes the text")
        store.delete(added.id)
        assert feedback.give(added.id, "ann", 1) is None
        assert feedback.standings([added.id]) == {} == feedback.of_pool("main")
    with sqlite3.connect(tmp_path / "pool.db") as connection:
        assert "quotes" not in "\n".join(connection.iterdump())
    connection.close()


def test_what_is_no_opinion(url: str) -> None:
    with PoolStore.open(url) as store:
        store.create_pool("main")
        (added,) = store.append([NewMemory("main", "p", "x")])
        feedback = Feedback(store.database)
        for value in (1.1, -2, float("nan")):
            with pytest.raises(InvalidMemory, match="value"):
                feedback.give(added.id, "ann", value)
        for comment in (" ", "x" * 2001, "a\x00b"):
            with pytest.raises(InvalidMemory, match="comment"):
                feedback.give(added.id, "ann", 1, comment)
        assert feedback.give("unknown", "ann", 1) is None


def test_an_opinion_too_weak_to_divide_is_neutral(url: str) -> None:
    with PoolStore.open(url) as store:
        store.create_pool("main")
        (added,) = store.append([NewMemory("main", "p", "x")])
        feedback = Feedback(store.database)
        assert feedback.give(added.id, "ann", 5e-324) == Standing(0.0, 1)
        assert feedback.of_pool("main") == {added.id: Standing(0.0, 1)}
