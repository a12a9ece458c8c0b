from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from memshare.config import Config, ConfigError, LLMConfig
from memshare.evaluation.lab import open_lab


@pytest.mark.parametrize("named", [True, False], ids=["evaluation.agents", "agent_llm"])
def test_a_partner_never_takes_an_agents_place(tmp_path: Path, named: bool) -> None:
    """An agent without a name of its own has the last part of its model's."""
    ours, theirs = LLMConfig(model="/nowhere/lm"), LLMConfig(model="/nowhere/other")
    config = Config()
    names = {"agents": {"lm": ours} if named else {}, "partners": {"lm": theirs, "other": theirs}}
    changed = config.model_copy(
        update={
            "agent_llm": ours,
            "run": config.run.model_copy(update={"dir": tmp_path}),
            "evaluation": config.evaluation.model_copy(update=names),
        }
    )

    async def opened() -> None:
        async with open_lab(changed, tmp_path):
            pass

    with pytest.raises(ConfigError, match=r"evaluation\.partners: lm is"):
        asyncio.run(opened())
