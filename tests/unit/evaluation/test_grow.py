from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from memshare.config import Config, load_config
from memshare.evaluation.data import Domain, Pair
from memshare.evaluation.grow import grow
from memshare.llm.base import Completion
from memshare.records import Grade
from memshare.sharing import turn as ends


class Says:
    """An agent that answers with its name; ``seeds``: what it was told to draw by."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seeds: list[int | None] = []

    async def answer(self, prompt: str, memories: Any, seed: int | None) -> Any:
        self.seeds.append(seed)
        return SimpleNamespace(completion=Completion(f"{self.name} on {prompt}", "stop", 1, 1))


class RefusesThree:
    """A scorer that lets all in but the third problem."""

    async def grade(self, prompt: str, answer: str, rubric: str) -> Grade:
        return Grade(0.0 if prompt == "problem 2" else 100.0, "")


def test_what_is_stored_names_the_agent_that_wrote_it() -> None:
    problems = tuple(Pair(f"problem {n}", "?") for n in range(5))
    lab: Any = SimpleNamespace(config=Config())
    agents: list[Any] = [Says("first"), Says("second")]
    scorer: Any = RefusesThree()
    grown = asyncio.run(grow(lab, agents, Domain("pool", (), problems, {}), scorer))
    assert [(item.agent, item.pair.answer) for item in grown.attempts] == [
        (n % 2, f"{agents[n % 2].name} on problem {n}") for n in range(5)
    ]
    assert [item.agent for item in grown.stored] == [0, 1, 1, 0]
    assert len(grown.memories) == 4


def test_samples_are_drawn_by_the_runs_seed() -> None:
    """Without one each would be a new one, in each run and each experiment."""
    problems = (Pair("problem", "?"),)
    for settings, seed in (([], None), (["agent.temperature=0.7"], 7)):
        agent: Any = Says("one")
        scorer: Any = RefusesThree()
        lab: Any = SimpleNamespace(config=load_config(None, ["run.seed=7", *settings]))
        asyncio.run(grow(lab, [agent], Domain("pool", (), problems, {}), scorer))
        assert agent.seeds == [seed]


def test_what_the_gateway_would_not_grade_is_not_graded() -> None:
    said = {"done": "stop", "cut": "length", "censored": "content_filter", " ": "stop"}

    class Ends:
        async def answer(self, prompt: str, memories: Any, seed: int | None) -> Any:
            return SimpleNamespace(completion=Completion(prompt, said[prompt], 1, 1))

    class Asked:
        async def grade(self, prompt: str, answer: str, rubric: str) -> Grade:
            graded.append(answer)
            return Grade(100.0, "")

    graded: list[str] = []
    lab: Any = SimpleNamespace(config=Config())
    agent: Any = Ends()
    scorer: Any = Asked()
    problems = tuple(Pair(prompt, "?") for prompt in said)
    grown = asyncio.run(grow(lab, [agent], Domain("pool", (), problems, {}), scorer))
    assert graded == [memory.answer for memory in grown.memories] == ["done"]
    assert grown.ends == dict.fromkeys((ends.STORED, ends.CUT_OFF, ends.UNFINISHED, ends.EMPTY), 1)
