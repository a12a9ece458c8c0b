import pytest

from memshare.evaluation.measures import CHRF
from memshare.evaluation.rows import (
    AVERAGE,
    WORLD,
    Key,
    Row,
    averages,
    count_row,
    differences,
    matched,
    mean_row,
    question_keys,
)


def row(dataset: str, metric: str, values: list[float], arm: str = "a", failed: int = 0) -> Row:
    questions = {f"q{i}": value for i, value in enumerate(values)}
    return mean_row(Key(arm, "", dataset, metric, "m", "s"), questions, 0, failed)


def test_questions_are_named_by_their_text_and_repeats_are_numbered() -> None:
    first, second, again, upper = question_keys(["Why?", "How?", "Why?", "  WHY? "])
    assert len({first, second, again, upper}) == 4
    assert (again, upper) == (f"{first}-1", f"{first}-2")
    assert question_keys(["How?", "Why?"]) == [second, first]


def test_averages_are_over_questions_of_what_the_metric_can_read() -> None:
    rows = [
        row("puns", "f1", [1.0, 1.0, 1.0], failed=1),
        row("riddles", "f1", [0.0], failed=2),
        *(row(dataset, CHRF, [0.9]) for dataset in ("lvshi", "jueju", "ci")),
        row(WORLD, "f1", [0.5]),
        count_row(Key("a", "", "puns", "count: stored", "m", "s"), 3, 4, 0),
    ]
    (average,) = averages(rows)
    assert (average.dataset, average.metric, average.value) == (AVERAGE, "f1", 0.75)
    assert (average.n, average.failed) == (4, 3)
    assert average.low is not None and average.low < 0.75 < (average.high or 0)


def test_differences_pair_the_questions_that_both_have() -> None:
    ours = mean_row(Key("a", "", "d", "f1", "m", "s"), {"x": 1.0, "y": 0.5, "z": 0.0}, 0)
    theirs = mean_row(Key("b", "", "d", "f1", "m", "s"), {"y": 0.25, "x": 0.5, "w": 9.0}, 0)
    stranger = mean_row(Key("b", "", "d", "f1", "m", "s"), {"w": 1.0}, 0)
    (found,) = differences([(ours, theirs), (ours, stranger)], 0)
    assert (found.mean, found.n) == (pytest.approx(0.375), 2)
    told = found.record()
    assert told["ours"] == {"arm": "a"} and told["theirs"] == {"arm": "b"}
    assert told["dataset"] == "d"


def by(model: str, arm: str = "a") -> Row:
    return mean_row(Key(arm, "", "d", "f1", model, "s"), {"q": 1.0}, 0)


def test_rows_are_paired_by_model_and_across_models_where_each_side_has_one() -> None:
    assert matched([by("x"), by("y")], [by("y"), by("x")]) == [
        (by("x"), by("x")), (by("y"), by("y")),
    ]  # fmt: skip
    assert matched([by("x")], [by("y")]) == [(by("x"), by("y"))]
    assert matched([by("x"), by("y")], [by("z")]) == []  # whose of the two would it be?
    assert matched([by("z")], [by("x"), by("y")]) == []
    other = matched([by("x")], [by("x"), by("y", "b")], lambda key: key._replace(arm="b"))
    assert other == [(by("x"), by("y", "b"))]


def test_many_differences_are_told_with_an_adjusted_p() -> None:
    pairs = [(row("d", "f1", [0.9] * 12), row("d", "f1", [0.1] * 12, "b"))]
    (alone,) = differences(pairs, 0)
    among = differences(pairs * 20, 0)
    assert alone.p == alone.p_holm < 0.01
    assert all(d.p == alone.p and d.p_holm == pytest.approx(20 * alone.p) for d in among)


def test_among_however_many_differences_a_sure_one_can_survive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 10,000 draws no p is below 0.0001, which for 501 differences is 0.0501 by Holm."""

    def surest(*of: object, seed: int, draws: int = 10_000) -> float:
        return 1 / (draws + 1)

    monkeypatch.setattr("memshare.evaluation.rows.paired_permutation", surest)
    sure = row("d", "f1", [0.9]), row("d", "f1", [0.1], "b")
    for number in (1, 500, 501, 2000):
        assert all(found.p_holm < 0.05 for found in differences([sure] * number, 0))
