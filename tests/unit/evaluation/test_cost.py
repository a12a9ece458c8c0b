"""What a turn of the loop is told to cost, by a real LM that is asked the same thing twice."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from memshare.config import Config, LLMConfig, load_config
from memshare.evaluation.data import Domain, Pair
from memshare.evaluation.experiments.cost import Metered, turn
from memshare.llm.base import Chat, Completion, LogLikelihood, Message
from memshare.llm.hf import TransformersBackend
from tests.loop import loop_config_file

CUT = "harbour"


class Watched(TransformersBackend):
    """The real backend; keeps what it measured, and how often tokens were counted.

    Its random weights find no end: every answer counts as ended but the one about ``CUT``.
    """

    counted = 0

    async def chat(self, chat: Chat) -> Completion:
        cut = CUT in str(chat.messages[-1]["content"])
        return replace(await super().chat(chat), finish_reason="length" if cut else "stop")

    async def loglikelihood(self, context: Sequence[Message], continuation: str) -> LogLikelihood:
        found = await super().loglikelihood(context, continuation)
        self.measured.append((context, found.tokens))
        return found

    def count_tokens(self, messages: Sequence[Message], extra: Any = None) -> int:
        self.counted += 1
        return super().count_tokens(messages, extra)

    @property
    def measured(self) -> list[tuple[Sequence[Message], int]]:
        found: list[tuple[Sequence[Message], int]] = self.__dict__.setdefault("_measured", [])
        return found


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("cost")
    return load_config(loop_config_file(folder / "run", folder))


@pytest.fixture
def llm(config: Config) -> Iterator[Watched]:
    llm = Watched(config.scorer_llm.model, LLMConfig(device="cpu"))
    yield llm
    asyncio.run(llm.aclose())


def test_only_what_the_loop_grades_is_graded_and_equal_answers_once(
    tmp_path: Path, config: Config, llm: Watched
) -> None:
    """Equal problems get equal answers, of which the scorer is asked once; of what was cut off
    it is not asked."""
    pair, endless = Pair("what is a teapot for?", "tea"), Pair(f"what is a {CUT} for?", "ships")
    lab: Any = SimpleNamespace(
        config=config, uncached={"lm": llm}, uncached_scorer=llm, encoder=None, work=tmp_path,
        own_pools={"keep": Domain("keep", (pair,), (pair, pair, endless), {})},
        dense=lambda memories, encoder: lambda questions, k: [[] for _ in questions],
    )  # fmt: skip
    stages, answered, accepted = asyncio.run(turn(lab, "lm", "keep"))
    ((context, written),) = llm.measured
    assert (answered, accepted) == (3, 2)
    paid = {stage.name: stage.tokens for stage in stages}
    assert paid["grade"] == llm.count_tokens(context) + written


def test_the_meter_tokenises_only_when_it_is_read(llm: Watched) -> None:
    context: list[Message] = [{"role": "user", "content": "why?"}]

    async def used() -> Metered:
        meter = Metered(llm)
        await meter.loglikelihood(context, "because")
        await meter.label_probabilities(context, ["0", "1"])
        await meter.chat(Chat(context, max_tokens=3))
        return meter

    meter = asyncio.run(used())
    assert llm.counted == 0
    written = llm.measured[0][1] + 1  # and what the chat wrote, up to three tokens
    assert 0 < meter.tokens() - 3 * llm.count_tokens(context) - written <= 3
