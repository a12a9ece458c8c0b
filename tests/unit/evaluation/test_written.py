"""What agents wrote for themselves is kept by all that decides it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from memshare.bootstrap import BootstrapReport
from memshare.config import Config, PoolSettings
from memshare.evaluation.data import Pair
from memshare.evaluation.experiments import bootstrap as experiment
from memshare.evaluation.material import as_memories
from memshare.sharing import SharedMemory
from tests.loop import loop_config


def test_what_was_written_is_found_again_by_rubric_and_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[PoolSettings] = []

    async def bootstrap(shared: SharedMemory, pool: str) -> BootstrapReport:
        seen.append(shared.config.pools[pool])
        return BootstrapReport(pool, 1)

    monkeypatch.setattr(experiment, "bootstrap", bootstrap)
    rubric = tmp_path / "rubric.md"
    agent: Any = SimpleNamespace(llm=SimpleNamespace(model="agent"))
    seeds = as_memories("pool", [Pair("a question", "an answer")])

    def written(text: str, **settings: Any) -> int:
        """How often something was written by now."""
        rubric.write_text(text)
        made = {"rubric": str(rubric), "max_principal_share": 0.1, **settings}
        config: Config = loop_config(tmp_path / "run", tmp_path, pools={"keep": made})
        lab: Any = SimpleNamespace(
            agents={"lm": agent}, scorer_llm=SimpleNamespace(model="scorer"), config=config,
            work=tmp_path, scorer=lambda kind: None,
        )  # fmt: skip
        asyncio.run(experiment.written(lab, "lm", "rubric", "pool", seeds))
        return len(seen)

    (tmp_path / "bootstrap").mkdir()
    assert [written("# Good?"), written("# Good?"), written("# True?")] == [1, 1, 2]
    assert written("# True?", near_duplicate=0.9) == 3
    # Whoever bootstraps a pool is no principal among others, as with `memshare bootstrap`.
    assert all(settings.max_principal_share is None for settings in seen)
