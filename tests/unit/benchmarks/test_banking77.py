from __future__ import annotations

import banking77
import pytest

from memshare.evaluation.data import Pair

TRAIN = [Pair(f"question {n} about {intent}", intent) for n in range(15) for intent in "cab"]


def p1(**values: float) -> dict[str, dict[str, float]]:
    return {name: {"P@1": value} for name, value in values.items()}


def test_a_pool_has_ten_memories_an_intent_and_never_the_rest() -> None:
    pool, rest = banking77.sample_pool(TRAIN, seed=1, intents=2)
    assert sorted(pair.answer for pair in pool) == ["a"] * 10 + ["b"] * 10
    assert sorted(pair.answer for pair in rest) == ["a"] * 5 + ["b"] * 5
    assert not set(pool) & set(rest)


def test_pools_follow_the_seed() -> None:
    first = banking77.sample_pool(TRAIN, seed=1, intents=None)
    assert first == banking77.sample_pool(TRAIN, seed=1, intents=None)
    assert first != banking77.sample_pool(TRAIN, seed=2, intents=None)


def test_claims_by_hand() -> None:
    rows = [
        p1(bm25=0.5, frozen=0.8, trained=0.85, true_labels=0.9),
        p1(bm25=0.6, frozen=0.6, trained=0.7, true_labels=0.7),
    ]
    found = banking77.claims(rows)
    assert found["p1_bm25"] == pytest.approx(0.55)
    assert found["p1_trained"] == pytest.approx(0.775)
    assert found["p1_errors_removed"] == pytest.approx((0.25 + 0.25) / 2)
    assert found["share_of_true_label_gain"] == pytest.approx((0.05 + 0.1) / (0.1 + 0.1))


def test_what_the_figures_leave_undefined_is_left_out() -> None:
    found = banking77.claims([p1(bm25=0.5, frozen=1.0, trained=1.0, true_labels=1.0)])
    assert set(found) == {"p1_bm25", "p1_frozen", "p1_trained", "p1_true_labels"}


@pytest.mark.parametrize(("low", "passes"), [(-0.01, True), (-0.03, False)])
def test_the_gate_is_judged_by_its_default_margin(low: float, passes: bool) -> None:
    gate = {"passed": True, "differences": {"current": {"MRR@10": {"low": low}}}}
    assert banking77.gate_verdict({"gate": gate})["passes_default_margin"] is passes
