"""Which answers the scorers grade, and whose quality is told of them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from memshare.config import Config
from memshare.evaluation.data import Domain, Pair
from memshare.evaluation.experiments.threshold import KINDS, QUALITY, rows
from memshare.evaluation.measures import F1
from memshare.evaluation.rows import Row
from memshare.llm.base import Completion
from memshare.records import Grade, Memory


class Samples:
    """An agent that never says the same twice."""

    said = 0

    async def answer(self, prompt: str, memories: Any, seed: int | None = None) -> Any:
        self.said += 1
        return SimpleNamespace(completion=Completion(f"0.{self.said}", "stop", 1, 1))


class TakesAll:
    async def grade(self, prompt: str, answer: str, rubric: str) -> Grade:
        return Grade(100.0, "")


class Measured:
    """An answer is as good as it says."""

    async def datasets(self, answered: Any) -> Any:
        return [[{F1: float(answers[0])}] for _, answers in answered]


def test_every_scorer_grades_the_same_answers() -> None:
    agent, pools = Samples(), dict[str, list[str]]()
    domain = Domain("pool", (), (Pair("problem 1", "?"), Pair("problem 2", "?")), {})

    async def answers(
        arms: Mapping[str, Any], domain: Domain, memories: Sequence[Memory], *, at: str
    ) -> list[Row]:
        pools.update({arm: [memory.answer for memory in memories] for arm in arms})
        return []

    lab: Any = SimpleNamespace(
        config=Config(), seed=0, agents={"lm": agent}, sampled=lambda: {"pool": domain},
        scorer=lambda kind: TakesAll(), measures=Measured(), answers=answers, encoder=None,
        dense=lambda memories, encoder: None, random=lambda memories: None,
    )  # fmt: skip

    async def told() -> list[Row]:
        return [row async for row in rows(lab)]

    found = asyncio.run(told())
    assert pools.keys() == {*KINDS, "random"}
    assert all(pool == ["0.1", "0.2"] for pool in pools.values())
    quality = [row.questions.values() for row in found if row.metric == QUALITY]
    assert quality and all(list(values) == [0.1, 0.2] for values in quality)
