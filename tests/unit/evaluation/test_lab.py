from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from memshare.config import Config, ConfigError, LLMConfig
from memshare.evaluation.data import Pair
from memshare.evaluation.lab import Lab, open_lab
from memshare.evaluation.material import as_memories
from memshare.retrieval.encoder import Encoder
from tests.tiny import tiny_encoder


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


def test_a_pool_that_nothing_got_into_has_no_shots(tmp_path: Path) -> None:
    """As where every seed memory leaks a test, and no answer reaches the threshold."""
    encoder = Encoder.from_folder(tiny_encoder(tmp_path / "encoder"), "cpu")
    lab: Any = SimpleNamespace(_fingerprints={}, _vectors={})
    assert Lab.dense(lab, [], encoder)(["why?", "how?"], 3) == [[], []]
    (memory,) = as_memories("pool", [Pair("why?", "so")])
    assert Lab.dense(lab, [memory], encoder)(["why?", "how?"], 3) == [[], [memory.id]]
