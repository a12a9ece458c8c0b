from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from memshare.config import TrainingConfig
from memshare.retrieval.text import memory_text
from memshare.training.select import (
    ALL_ALIKE,
    NO_CANDIDATES,
    NO_LABEL,
    NOT_BETTER,
    NOT_SCORED,
    Selected,
    select,
    select_one,
    text_key,
)
from tests.training_data import candidate, example, examples

CONFIG = TrainingConfig(positives=1, hard_negatives=2)


def chosen(item: Selected | str) -> tuple[list[str], list[str]]:
    assert isinstance(item, Selected), item
    return [p.id for p in item.positives], [p.id for p in item.negatives]


def test_best_are_positives_and_worst_are_negatives() -> None:
    scores = {"a": -2.0, "b": -0.5, "c": -4.0, "d": -1.0, "e": -5.0, "f": -3.5}
    made = example(candidates=tuple(candidate(n, f"text {n}", s) for n, s in scores.items()))
    config = TrainingConfig(positives=2, hard_negatives=3)
    assert chosen(select_one(made, config)) == (["b", "d"], ["e", "c", "f"])


@pytest.mark.parametrize(("margin", "reason"), [(0.0, None), (0.5, NOT_BETTER)])
def test_a_positive_must_beat_the_baseline_by_the_margin(margin: float, reason: str | None) -> None:
    made = example(
        baseline_loglik=-1.5, candidates=(candidate("a", "a", -1.0), candidate("b", "b", -2.0))
    )
    result = select_one(made, TrainingConfig(margin=margin))
    assert result == reason if reason else chosen(result) == (["a"], ["b"])


def test_only_what_beats_the_baseline_is_a_positive() -> None:
    made = example(
        baseline_loglik=-1.5,
        candidates=tuple(candidate(n, n, s) for n, s in (("a", -1.0), ("b", -1.5), ("c", -4.0))),
    )
    config = TrainingConfig(positives=2, hard_negatives=4)
    assert chosen(select_one(made, config)) == (["a"], ["c", "b"])


def test_without_a_baseline_the_best_is_taken() -> None:
    made = example(baseline_loglik=None, candidates=(candidate("a", "a", -9.0),))
    assert chosen(select_one(made, CONFIG)) == (["a"], [])
    alike = (candidate("a", "a", -13.8), candidate("b", "b", -13.8))
    assert select_one(replace(made, candidates=alike), CONFIG) == ALL_ALIKE
    told = replace(made, candidates=alike, baseline_loglik=-20.0)  # both are better than none
    assert chosen(select_one(told, CONFIG)) == (["a"], [])


def test_reasons_are_counted() -> None:
    made = [
        example("1"),
        example("2", candidates=(candidate("a", "a", None), candidate("b", "b", math.nan))),
        example("3", candidates=(candidate("a", "a", -3.0),)),
        example("4", labels="given", candidates=(candidate("a", "a", -1.0),)),
        example("5", candidates=(candidate("5", "its own id", -0.1),)),
        example("6", candidates=(candidate("a", "a", -0.1),)),
    ]
    result = select(made, CONFIG)
    assert result.dropped == {NO_CANDIDATES: 2, NOT_SCORED: 1, NOT_BETTER: 1, NO_LABEL: 1}
    assert [item.query_id for item in result.items] == ["6"]
    assert result.without_negatives == 1  # kept: the batch gives it negatives
    assert str(result).startswith("1 usable examples (1 without hard negatives); ")
    assert "; 2 dropped: no candidates" in str(result)


def test_the_latest_example_of_a_query_counts_at_the_place_of_the_first() -> None:
    good, better = (candidate("a", "a", -0.1),), (candidate("b", "b", -0.2),)
    made = [
        example("1", candidates=good, labels="likelihood"),
        example("2"),
        example("3", candidates=good, pool="other"),
        example("1", candidates=better, labels="prompted", scorer="later"),
        example("2", candidates=good),
        example("3"),
    ]
    result = select(made, CONFIG)
    assert [item.query_id for item in result.items] == ["1", "2"]
    assert [item.positives[0].id for item in result.items] == ["b", "a"]
    assert result.dropped == {NO_CANDIDATES: 1}
    assert result.counts()["pools"] == {"main": 2}
    assert result.counts()["labels"] == ["likelihood", "prompted"]
    assert result.counts()["scorers"] == ["later", "made"]


def test_what_is_chosen_is_read_back_as_it_was() -> None:
    odd = example(
        "\u00fc", query="line\nbreak \u2028 \U0001f375", principal="me",
        candidates=(candidate("a", "a\x00", -1 / 3), candidate("b", "b", -2.0)),
    )  # fmt: skip
    made = [odd, *examples(20)]
    result = select(made, CONFIG)
    assert list(result.items) == [select_one(item, CONFIG) for item in made]
    assert result.items[-1] == result.items[20] == select_one(made[20], CONFIG)
    assert result.items[3:5] == [select_one(item, CONFIG) for item in made[3:5]]
    with pytest.raises(IndexError):
        result.items[21]


def test_copies_and_equal_answers_are_never_negatives() -> None:
    made = example(
        answer="forty two",
        candidates=(
            candidate("best", "the positive", -0.5, "good answer"),
            candidate("copy", "The  POSITIVE", -9.0, "else"),
            candidate("own", memory_text("question q", "forty two"), -9.0, "else 2"),
            candidate("same-as-own", "x", -9.0, "Forty  Two"),
            candidate("same-as-positive", "y", -9.0, "Good Answer"),
            candidate("same-prompt", memory_text("Question  Q", "another"), -9.0, "another"),
            candidate("fine", "z", -2.0, "other"),
            candidate("fine-again", "Z", -2.5, "other"),
        ),
    )
    config = TrainingConfig(hard_negatives=7)
    assert chosen(select_one(made, config)) == (["best"], ["fine"])


def test_near_positives_are_masked_everywhere() -> None:
    made = example(
        candidates=tuple(
            candidate(n, n, s)
            for n, s in (("p1", -0.5), ("p2", -1.0), ("near", -1.2), ("tie", -1.0), ("far", -2.0))
        )
    )
    config = TrainingConfig(positives=2, hard_negatives=5, false_negative_margin=0.3)
    item = select_one(made, config)
    positives, negatives = chosen(item)
    assert positives == ["p1", "p2"] and negatives == ["far"]
    assert isinstance(item, Selected)
    assert {"p1", "p2", "near", "tie", "q"} <= item.never_negative
    assert {text_key("near"), text_key("p1")} <= item.never_negative
    assert "far" not in item.never_negative and text_key("far") not in item.never_negative


def test_labels_none_teaches_the_own_memory() -> None:
    made = example(
        labels="none",
        baseline_loglik=None,
        candidates=(
            candidate("first", "1", None, rank=0),
            candidate("second", "2", None, rank=1),
            candidate("same", "3", None, "answer q", rank=2),
            candidate("third", "4", None, rank=3),
        ),
    )
    item = select_one(made, CONFIG)
    assert chosen(item) == (["q"], ["first", "second"])
    assert isinstance(item, Selected)
    assert item.positives[0].text == memory_text("question q", "answer q")
    assert chosen(select_one(replace(made, candidates=()), CONFIG)) == (["q"], [])


@pytest.mark.parametrize(
    ("labels", "settings", "idle"),
    [
        ("none", {"distill_weight": 1.0}, True),
        ("none", {}, False),
        ("given", {"distill_weight": 1.0}, False),
        ("likelihood", {"distill_weight": 1.0, "hard_negatives": 0}, True),
        ("likelihood", {"distill_weight": 1.0, "hard_negatives": 0, "positives": 2}, False),
        (
            "likelihood",
            {"distill_weight": 1.0, "hard_negatives": 0, "positives": 2, "positives_per_step": 1},
            True,
        ),
    ],
)
def test_distilling_where_there_is_no_preference_is_a_warning(
    labels: str, settings: dict[str, Any], idle: bool
) -> None:
    worth = (None, None) if labels == "none" else (0.0, -1.0)
    found = tuple(candidate(f"m{n}", f"text {n}", value) for n, value in enumerate(worth))
    told = str(select([example(labels=labels, candidates=found)], TrainingConfig(**settings)))
    assert told.startswith("1 usable examples")
    assert ("warning: training.distill_weight does nothing" in told) == idle


def test_labels_given_need_no_baseline() -> None:
    made = example(
        labels="given",
        baseline_loglik=None,
        candidates=(candidate("other", "o", -1.0), candidate("equal", "e", 0.0)),
    )
    # The margin is in nats of a measured likelihood: labels that are given are sure.
    config = TrainingConfig(margin=5.0, false_negative_margin=5.0)
    assert chosen(select_one(made, config)) == (["equal"], ["other"])


@pytest.mark.parametrize("labels", ["likelihood", "given"])
def test_among_equal_scores_the_first_proposed_is_taken(labels: str) -> None:
    """As positive and as hard negative: BM25's first rank before the tail that vectors proposed."""
    scores = [("n0", -1.0), ("p0", 0.0), ("n1", -1.0), ("p1", 0.0), ("n2", -1.0)]
    scores += [] if labels == "given" else [("worst", -9.0)]
    made = example(
        labels=labels,
        baseline_loglik=None,
        candidates=tuple(candidate(n, n, s, rank=rank) for rank, (n, s) in enumerate(scores)),
    )
    worst = [name for name, score in scores if score == -9.0]
    config = TrainingConfig(positives=1, hard_negatives=2 + len(worst))
    assert chosen(select_one(made, config)) == (["p0"], [*worst, "n0", "n1"])
