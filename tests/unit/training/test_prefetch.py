"""Batches made one step ahead."""

from __future__ import annotations

import threading

import pytest

from memshare.training.prefetch import prefetched


def test_the_next_one_is_made_meanwhile_in_order_and_none_too_many() -> None:
    made: list[int] = []
    begun = {step: threading.Event() for step in range(3, 6)}

    def make(step: int) -> int:
        made.append(step)
        begun[step].set()
        return step * step

    with prefetched(make, stop=6) as batch:
        assert made == []
        for step in range(3, 6):
            assert batch(step) == step * step
            if step + 1 < 6:
                assert begun[step + 1].wait(10)  # before it is asked for
    assert made == [3, 4, 5]


def test_an_error_is_raised_for_its_own_step_and_the_thread_ends() -> None:
    failed = threading.Event()

    def make(step: int) -> int:
        if step == 1:
            failed.set()
            raise OSError("no room")
        return step

    before = threading.active_count()
    with pytest.raises(OSError, match="no room"), prefetched(make, stop=9) as batch:
        assert batch(0) == 0
        assert failed.wait(10)  # and the step that is under way knows nothing of it
        assert threading.active_count() == before + 1
        batch(1)
    assert threading.active_count() == before


def test_a_step_out_of_order_is_made_all_the_same() -> None:
    with prefetched(str, stop=100) as batch:
        assert [batch(step) for step in (5, 7, 7, 2)] == ["5", "7", "7", "2"]
