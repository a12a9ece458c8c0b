"""Take out of a pool what would give a test question's answer away.

The rule: an item of the pool, or of the problems that grow it, is dropped if its question or its
answer is the same as any test item's after folding case and white space, or a near-duplicate of it
(Jaccard similarity of word 3-gram sets at or above the threshold). It is strict on purpose: another
riddle with the same answer goes as well. The pool gives way, not the tests, so that every published
test question stays; tests are only made unique by question.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from memshare.evaluation.data import Domain, Pair
from memshare.records import normalise
from memshare.training.split import Similar, grams

NEAR_DUPLICATE = 0.8


class _Seen:
    """Texts to compare with, by exact form and by word 3-grams."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._exact = {normalise(text) for text in texts}
        self._similar = Similar()
        for text in self._exact:
            self._similar.add(grams(text))

    def exact(self, text: str) -> bool:
        return normalise(text) in self._exact

    def near(self, text: str) -> bool:
        return self._similar.near(grams(text), NEAR_DUPLICATE)


@dataclass(frozen=True)
class Leaks:
    """How many unique tests of one dataset leak into pool or problems, and what was dropped."""

    dataset: str
    tests: int
    unique_tests: int
    exact_questions: int
    exact_answers: int
    near_questions: int


def unique(tests: Sequence[Pair]) -> tuple[Pair, ...]:
    """The first test of each question."""
    first: dict[str, Pair] = {}
    for test in tests:
        first.setdefault(normalise(test.prompt), test)
    return tuple(first.values())


def leak_report(domain: Domain) -> list[Leaks]:
    """Count each dataset's leaks, over the tests as published."""
    material = [*domain.pool, *domain.problems]
    questions = _Seen(pair.prompt for pair in material)
    answers = _Seen(pair.answer for pair in material)
    return [
        Leaks(
            dataset,
            len(tests),
            len(unique(tests)),
            sum(questions.exact(test.prompt) for test in tests),
            sum(answers.exact(test.answer) for test in tests),
            sum(questions.exact(test.prompt) or questions.near(test.prompt) for test in tests),
        )
        for dataset, tests in domain.tests.items()
    ]


def decontaminate(domain: Domain, beside: Iterable[Domain] = ()) -> Domain:
    """``domain`` without leaking pool items and problems, its tests unique.

    ``beside``: domains whose tests are asked of the same memories, or of an encoder that learns
    from them.
    """
    tests = [test for one in (domain, *beside) for group in one.tests.values() for test in group]
    questions = _Seen(test.prompt for test in tests)
    answers = _Seen(test.answer for test in tests)

    def clean(pairs: Sequence[Pair]) -> tuple[Pair, ...]:
        return tuple(
            pair
            for pair in pairs
            if not (questions.exact(pair.prompt) or questions.near(pair.prompt))
            and not (answers.exact(pair.answer) or answers.near(pair.answer))
        )

    return replace(
        domain,
        pool=clean(domain.pool),
        problems=clean(domain.problems),
        tests={dataset: unique(group) for dataset, group in domain.tests.items()},
    )


def decontaminate_all(domains: Mapping[str, Domain]) -> dict[str, Domain]:
    """Every domain without what leaks a test of any of them: pools are put together, and one
    encoder is trained on all."""
    return {name: decontaminate(domain, domains.values()) for name, domain in domains.items()}
