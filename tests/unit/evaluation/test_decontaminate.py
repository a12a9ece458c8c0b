from dataclasses import replace

import pytest

from memshare.evaluation.data import Domain, Pair, load_nine
from memshare.evaluation.decontaminate import decontaminate, decontaminate_all, leak_report, unique
from memshare.records import normalise


def domain(pool: list[Pair], tests: list[Pair]) -> Domain:
    return Domain("d", tuple(pool), (), {"t": tuple(tests)})


TEST = Pair(
    "Where does the old river go at night?", "It sleeps under the stone bridge of the town."
)


@pytest.mark.parametrize(
    "leak",
    [
        Pair("where  does THE old river go at night?", "Somewhere else."),
        Pair("Another question altogether?", "it sleeps under the stone bridge of the town."),
        Pair("So: where does the old river go at night?", "Somewhere else."),
    ],
    ids=["question", "answer", "near question"],
)
def test_leaks_go_and_the_rest_stays(leak: Pair) -> None:
    clean = Pair("What has an eye but cannot see?", "A needle.")
    assert decontaminate(domain([leak, clean], [TEST])).pool == (clean,)


def test_no_domain_gives_another_ones_tests_away() -> None:
    """Pools are put together, and one encoder is trained on all of them."""
    copy, clean = (
        Pair(TEST.prompt, "Nowhere."),
        Pair("What has an eye but cannot see?", "A needle."),
    )
    asked = domain([clean], [TEST])
    beside = Domain("e", (copy, clean), (copy,), {"u": (Pair("Another?", "Yes."),)})
    found = decontaminate_all({"d": asked, "e": beside})
    assert found["d"] == asked
    assert found["e"] == replace(beside, pool=(clean,), problems=())


def test_tests_are_unique_by_question_and_keep_their_order() -> None:
    a, b = Pair("A?", "1"), Pair("B?", "2")
    assert unique([a, b, Pair("a?", "3")]) == (a, b)


@pytest.fixture(scope="module")
def nine() -> dict[str, Domain]:
    try:
        return load_nine()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_leaks_of_the_published_data_are_the_known_ones(nine: dict[str, Domain]) -> None:
    found = {
        leak.dataset: leak
        for name in ("literary", "logic", "plan")
        for leak in leak_report(nine[name])
    }
    questions = {name: leak.exact_questions for name, leak in found.items()}
    assert questions == {
        "limerick": 40, "lvshi": 0, "sonnet": 0, "puns": 14, "puzzle": 0, "riddles": 21,
        "fitness": 0, "study": 0, "travel": 0,
    }  # fmt: skip
    assert found["limerick"].unique_tests == 20 and found["riddles"].exact_answers == 27
    single = {leak.dataset: leak.exact_questions for leak in leak_report(nine["single"])}
    assert (single["limerick"], single["riddles"], single["puns"]) == (28, 17, 8)


def test_nothing_leaks_after_decontamination(nine: dict[str, Domain]) -> None:
    for published in nine.values():
        clean = decontaminate(published)
        questions = {normalise(p.prompt) for p in (*clean.pool, *clean.problems)}
        answers = {normalise(p.answer) for p in (*clean.pool, *clean.problems)}
        for tests in clean.tests.values():
            assert not questions & {normalise(t.prompt) for t in tests}
            assert not answers & {normalise(t.answer) for t in tests}
        assert all(leak.near_questions == 0 for leak in leak_report(clean))
