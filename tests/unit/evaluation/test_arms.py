from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from memshare.config import AgentConfig, LLMConfig
from memshare.evaluation.arms import Arm, RememberingAgent
from memshare.llm.hf import TransformersBackend
from memshare.metrics.bertscore import BertScore
from memshare.records import Memory
from tests.tiny_lm import tiny_lm


def memory(prompt: str, answer: str, id: str = "m") -> Memory:
    return Memory(id, "p", prompt, answer, None, None, None, "2025-01-01T00:00:00Z", {}, 1)


class Counting(TransformersBackend):
    """The real backend; counts what reaches it."""

    asked = 0

    async def chat(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        self.asked += 1
        return await super().chat(*args, **kwargs)


def test_a_remembering_agent_asks_for_each_prompt_once(tmp_path: Path) -> None:
    llm = Counting(str(tiny_lm(tmp_path / "lm")), LLMConfig(device="cpu"))
    agent = RememberingAgent(llm, AgentConfig(max_tokens=4))

    async def ask() -> list[str]:
        shots: Sequence[Sequence[Memory]] = (
            [],
            [memory("a", "b")],
            [memory("a", "b", id="another")],  # the same text
            [memory("a", "c")],
        )
        return [(await agent.answer("why?", shown)).text for shown in shots]

    try:
        first = asyncio.run(ask())
        assert llm.asked == 3 and first[1] == first[2]
        assert asyncio.run(ask()) == first and llm.asked == 3
    finally:
        asyncio.run(llm.aclose())
    with pytest.raises(ValueError, match=r"0\.7"):
        RememberingAgent(llm, AgentConfig(temperature=0.7))


def test_an_arm_counts_failures_also_in_its_parts() -> None:
    arm = Arm([BertScore(0.5, 0.5, 0.5), BertScore(0, 0, 0), BertScore(1, 1, 1)], ["a", None, ""])
    assert arm.failed == 1
    assert arm.part([0, 2]).failed == 0 and arm.part([1]).failed == 1
    assert arm.part([0, 2]).summary(seed=0)["f1"] == 0.75
