"""By what an experiment measures what is found in a pruned pool."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from memshare.evaluation.data import Domain, Pair
from memshare.evaluation.experiments import pruning
from memshare.evaluation.material import as_memories
from memshare.evaluation.rows import WORLD
from memshare.records import Memory


class Blind:
    """An encoder to which all texts are the same."""

    def encode_queries(self, texts: Sequence[str]) -> None: ...

    def encode_memories(self, texts: Sequence[tuple[str, str]]) -> None: ...


def test_who_keeps_little_is_measured_by_all_that_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four right memories one is left: it alone is found, which is a quarter of them."""
    known = tuple(Pair(f"problem {n}", f"answer {n}") for n in range(4))
    test = Pair("question", "answer")
    keys = dict.fromkeys((test.prompt, "problem 9", *(pair.prompt for pair in known)), "group")
    domain = Domain(WORLD, known, (), {WORLD: (test,)}, keys)
    memories = as_memories(WORLD, [*known, Pair("problem 9", "a wrong answer")])

    async def arrivals(lab: Any, domain: Domain) -> tuple[int, list[Memory]]:
        return len(memories), memories

    async def pruned(*of: Any) -> dict[tuple[str, str], list[Memory]]:
        return {("age", "25%"): memories[3:]}

    async def nothing(*of: Any, **settings: Any) -> list[Any]:
        return []

    async def learn(pools: Any) -> Any:
        return SimpleNamespace(encoder=Blind())

    monkeypatch.setattr(pruning, "arrivals", arrivals)
    monkeypatch.setattr(pruning, "pruned", pruned)
    lab: Any = SimpleNamespace(
        sampled=lambda: {WORLD: domain}, learn=learn, stream=None, agents={"lm": None}, seed=0,
        encoder_name="encoder", answers=nothing, random=lambda memories: None,
        dense=lambda left, encoder: lambda questions, k: [[memory.id for memory in left][:k]],
    )  # fmt: skip

    async def told() -> dict[tuple[str, str], float]:
        return {(row.arm, row.metric): row.value async for row in pruning.rows(lab)}

    found = asyncio.run(told())
    assert found["age", "recall@10"] == 0.25 and found["age", "MRR@10"] == 1.0
    assert found["age", "nDCG@10"] < 0.5
    assert found["nothing pruned", "recall@10"] == 1.0
    assert found["age", pruning.LEFT] == 2 and found["age", pruning.RIGHT] == 1
