"""Taking turns among equal servers, and leaving out those that fail: by a clock that is set."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memshare.llm.replicas import LONGEST_REST_SECONDS, Replicas


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_all_get_equally_many() -> None:
    replicas = Replicas(["a", "b", "c"])
    assert [replicas.pick() for _ in range(6)] == ["a", "b", "c", "a", "b", "c"]


def test_one_that_fails_is_left_out_for_a_while_and_longer_each_time(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = Clock()
    replicas = Replicas(["a", "b"], rest=2.0, clock=clock)
    replicas.failed("a")
    assert {replicas.pick() for _ in range(5)} == {"b"}
    clock.now += 2.0
    picked = Counter(replicas.pick() for _ in range(6))
    assert picked["a"] == 1  # one request tries it; others don't wait for what may hang
    replicas.failed("a")
    clock.now += 2.0
    assert "a" not in {replicas.pick() for _ in range(4)}
    clock.now += 2.0
    assert "a" in {replicas.pick() for _ in range(2)}
    replicas.worked("a")
    assert Counter(replicas.pick() for _ in range(6)) == {"a": 3, "b": 3}
    replicas.worked("b")
    replicas.failed("a")
    told = [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    out = "LLM server a does not answer"
    assert told == [out, "LLM server a answers again", out]  # once each, however often it is tried


def test_what_fails_together_fails_once() -> None:
    """A server that dies with many requests under way is tried again after the first pause."""
    clock = Clock()
    replicas = Replicas(["a", "b"], rest=2.0, clock=clock)
    for _ in range(50):
        replicas.failed("a")
    clock.now += 2.0
    assert "a" in {replicas.pick() for _ in range(2)}
    replicas.failed("a")  # the trial
    clock.now += 2.0
    assert "a" not in {replicas.pick() for _ in range(4)}
    clock.now += 2.0
    assert "a" in {replicas.pick() for _ in range(2)}


def test_a_retry_goes_to_another_one_and_never_nowhere() -> None:
    clock = Clock()
    replicas = Replicas(["a", "b"], rest=2.0, clock=clock)
    first = replicas.pick()
    assert replicas.pick([first]) != first
    replicas.failed("b")
    clock.now += 1.0
    replicas.failed("a")
    assert replicas.pick() == "b"  # due first


def test_the_only_one_is_always_picked() -> None:
    replicas = Replicas(["a"])
    for _ in range(20):
        replicas.failed("a")
        assert replicas.pick(["a"]) == "a"


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.floats(0, 30)), max_size=60))
def test_who_failed_just_now_gets_nothing_while_another_works(
    events: list[tuple[int, bool, float]],
) -> None:
    clock = Clock()
    replicas = Replicas(["a", "b", "c"], rest=2.0, clock=clock)
    failed: dict[str, float] = {}
    for which, worked, pause in events:
        url = "abc"[which]
        if worked:
            replicas.worked(url)
            failed.pop(url, None)
        else:
            replicas.failed(url)
            failed.setdefault(url, clock.now)
        picked = replicas.pick()
        if len(failed) < 3 and picked in failed:
            assert clock.now - failed[picked] >= 2.0
            failed[picked] = clock.now  # left out again while this request tries it
        clock.now += pause
    clock.now += LONGEST_REST_SECONDS
    assert {replicas.pick() for _ in range(3)} == set("abc")
