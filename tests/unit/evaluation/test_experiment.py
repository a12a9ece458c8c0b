from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from memshare.bootstrap import BootstrapError
from memshare.config import load_config
from memshare.evaluation.cli import _experiments
from memshare.evaluation.experiment import Experiment, contrasts, settings
from memshare.evaluation.measures import F1
from memshare.evaluation.rows import Key, Row, mean_row
from memshare.llm.base import LLMError


async def nothing(lab: Any) -> Any:
    yield lab


def row(arm: str, model: str, metric: str = F1) -> Row:
    return mean_row(Key(arm, "", "puns", metric, model, "decontaminated"), {"q": 1.0}, 0)


def test_one_agents_answers_are_never_compared_with_another_agents() -> None:
    """What ranked for two arms may differ; who answered may not, though each arm has one row."""
    experiment = Experiment("shots", "?", nothing, (("ours", "theirs"),), tested=(F1, "MRR@10"))
    found = [row("ours", "encoder", "MRR@10"), row("theirs", "BM25", "MRR@10")]
    answered = [row("ours", "small"), row("theirs", "large")]
    agents = ("small", "large")
    assert contrasts(experiment, [*found, *answered], agents) == [(found[0], found[1])]
    both = [*answered, row("theirs", "small")]
    assert contrasts(experiment, both, agents) == [(both[0], both[2])]


def test_a_report_says_what_admits_a_memory_and_how_texts_are_encoded() -> None:
    config = load_config(None, ["encoder.max_length=96", "pools.commons.threshold=40"])
    told = settings(config)
    assert told["pools"]["commons"]["threshold"] == 40 and told["encoder"]["max_length"] == 96
    assert {"split", "bm25", "mining", "training"} <= told.keys()


@pytest.mark.parametrize("error", [BootstrapError("no seeds"), LLMError("no answer")])
def test_an_experiment_that_can_not_be_made_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    run: list[str] = []

    async def run_experiment(experiment: Experiment, lab: Any, *, quick: bool) -> Any:
        run.append(experiment.name)
        if experiment.name == "bootstrap":
            raise error

    @asynccontextmanager
    async def open_lab(config: Any, out: Path) -> AsyncIterator[None]:
        yield None

    told: list[dict[str, str]] = []
    monkeypatch.setattr("memshare.evaluation.experiment.run_experiment", run_experiment)
    monkeypatch.setattr("memshare.evaluation.lab.open_lab", open_lab)
    monkeypatch.setattr(
        "memshare.evaluation.pages.write_page", lambda out, failed, new: told.append(failed)
    )
    names = ["bootstrap", "pruning"]
    assert asyncio.run(_experiments(names, load_config(None, []), tmp_path, True)) == 1
    assert run == names and told[-1] == {"bootstrap": str(error)}
