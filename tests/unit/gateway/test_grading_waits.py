"""What is wrong with the scorer, and not with the pair, costs no pair its grade."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from memshare.config import Config
from memshare.gateway import background
from memshare.gateway.background import ScoringQueue
from memshare.gateway.metrics import Metrics
from memshare.llm.rubric import load_rubric
from memshare.llm.scorer import Scorer
from memshare.records import Grade, Pair
from memshare.sharing import open_shared
from tests.flaky import Flaky, reply
from tests.loop import loop_config

FULL_MARKS = {
    "choices": [
        {
            "message": {"content": "9"},
            "logprobs": {"content": [{"top_logprobs": [{"token": "9", "logprob": 0.0}]}]},
        }
    ]
}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_RETRY_SECONDS", (0.05,))


@pytest.fixture
def server() -> Iterator[Flaky]:
    with Flaky() as made:
        yield made


def decided(config: Config, scorer: Scorer | None = None) -> dict[str, int]:
    """The decisions about one pair."""

    async def inside() -> dict[str, int]:
        async with open_shared(config) as shared:
            shared.scorer = scorer or shared.scorer
            queue = ScoringQueue(shared, Metrics())
            await queue.put([Pair("keep", "Why?", "Because.")])
            queue.start()
            await asyncio.wait_for(queue.join(), 20)
            await queue.stop()
            return shared.store.decisions("keep")

    return asyncio.run(inside())


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_scorer_that_does_not_let_us_in_is_waited_for(
    tmp_path: Path, models: Path, server: Flaky, status: int
) -> None:
    server.behave = lambda handler, number: (
        reply(handler, status, {"error": {"message": "no such key"}})
        if number < 3
        else reply(handler, 200, FULL_MARKS)
    )
    llm = {"backend": "openai", "model": "judge", "url": server.url, "retries": 0}
    scorer = {"kind": "rubric", "grading": "labels"}
    config = loop_config(tmp_path, models, scorer_llm=llm, scorer=scorer)
    assert decided(config) == {"stored": 1}
    assert len(server.times) == 3


class Faulty(Scorer):
    """Fails, as nobody foresaw, the first ``times`` times."""

    def __init__(self, times: int) -> None:
        self.left = times

    async def _grade(self, prompt: str, answer: str, rubric_text: str) -> Grade:
        self.left -= 1
        if self.left >= 0:
            raise RuntimeError("a bug, or a passing fault")
        return Grade(90.0)


@pytest.mark.parametrize(("times", "reason"), [(1, "stored"), (4, "stored"), (5, "scoring failed")])
def test_an_unknown_failure_is_tried_again_five_times_in_all(
    tmp_path: Path, models: Path, times: int, reason: str
) -> None:
    assert decided(loop_config(tmp_path, models), Faulty(times)) == {reason: 1}


def test_a_rubric_that_is_gone_for_a_while_is_waited_for(tmp_path: Path, models: Path) -> None:
    """However many pairs of other pools are graded meanwhile."""
    rubric = tmp_path / "rubric.md"
    rubric.write_text(load_rubric("general"))
    pools = {"keep": {"rubric": str(rubric), "threshold": 0}, "other": {"threshold": 0}}
    config = loop_config(tmp_path / "run", models, pools=pools)

    async def inside() -> None:
        async with open_shared(config) as shared:
            shared.scorer = Faulty(0)
            rubric.rename(tmp_path / "away.md")
            queue = ScoringQueue(shared, Metrics())
            queue.start()
            await queue.put([Pair("keep", "Why?", "Because.")])
            for number in range(15):  # far more than the attempts that a pair has
                await queue.put([Pair("other", f"question {number}", "yes")])
                await asyncio.sleep(0.1)
            async with asyncio.timeout(20):
                while shared.store.decisions("other") != {"stored": 15}:
                    await asyncio.sleep(0.1)
            assert shared.store.decisions("keep") == {}
            (tmp_path / "away.md").rename(rubric)
            await asyncio.wait_for(queue.join(), 20)
            await queue.stop()
            assert shared.store.decisions("keep") == {"stored": 1}

    asyncio.run(inside())
