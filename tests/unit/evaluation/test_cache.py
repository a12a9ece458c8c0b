from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memshare.config import LLMConfig, ScorerConfig
from memshare.evaluation.cache import CachedLLM, ResultCache, cached
from memshare.llm import quoting
from memshare.llm.base import Chat, LLMError, Message
from memshare.llm.hf import TransformersBackend
from memshare.llm.scorer import RubricScorer
from tests.tiny_lm import tiny_lm


class Counting(TransformersBackend):
    """The real backend; counts what reaches it, and fails as often as told."""

    asked = 0
    failures = 0

    async def chat(self, *args: Any, **kwargs: Any) -> Any:
        self._count()
        return await super().chat(*args, **kwargs)

    async def loglikelihood(self, *args: Any, **kwargs: Any) -> Any:
        self._count()
        return await super().loglikelihood(*args, **kwargs)

    async def label_probabilities(self, *args: Any, **kwargs: Any) -> Any:
        self._count()
        return await super().label_probabilities(*args, **kwargs)

    def _count(self) -> None:
        self.asked += 1
        if self.failures:
            self.failures -= 1
            raise LLMError("no answer this time")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm(tmp_path_factory.mktemp("lm") / "lm", context=2048)


@pytest.fixture
def llm(folder: Path) -> Iterator[Counting]:
    llm = Counting(str(folder), LLMConfig(device="cpu"))
    yield llm
    asyncio.run(llm.aclose())


def ask(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def test_every_part_of_a_call_is_part_of_the_key(llm: Counting) -> None:
    kept = cached(llm)

    async def all_calls() -> list[object]:
        return [
            (await kept.chat(Chat(ask("why?"), max_tokens=4))).text,
            (await kept.chat(Chat(ask("why not?"), max_tokens=4))).text,
            (await kept.chat(Chat(ask("why?"), max_tokens=5))).text,
            (await kept.chat(Chat(ask("why?"), max_tokens=4, temperature=1.0, seed=1))).text,
            (await kept.chat(Chat(ask("why?"), max_tokens=4, temperature=1.0, seed=2))).text,
            await kept.loglikelihood(ask("why?"), "because"),
            await kept.loglikelihood(ask("why?"), "so"),
            await kept.label_probabilities(ask("why?"), ["0", "1"]),
            await kept.label_probabilities(ask("why?"), ["0", "2"]),
        ]

    first = asyncio.run(all_calls())
    assert llm.asked == 9
    assert asyncio.run(all_calls()) == first and llm.asked == 9


def test_another_model_has_other_results(llm: Counting, tmp_path: Path) -> None:
    other = Counting(str(tiny_lm(tmp_path / "other", seed=1)), LLMConfig(device="cpu"))
    cache = ResultCache()

    async def both() -> None:
        for one in (llm, other):
            await CachedLLM(one, cache).chat(Chat(ask("why?"), max_tokens=4))
        await other.aclose()

    asyncio.run(both())
    assert (llm.asked, other.asked) == (1, 1)


def test_results_outlive_the_process_and_equal_calls_in_flight_are_one(
    llm: Counting, tmp_path: Path
) -> None:
    path = tmp_path / "deep" / "results.db"

    async def crowd(kept: CachedLLM) -> set[str]:
        found = await asyncio.gather(
            *(kept.chat(Chat(ask("why?"), max_tokens=4)) for _ in range(8))
        )
        return {completion.text for completion in found}

    said = asyncio.run(crowd(cached(llm, path)))
    assert len(said) == 1 and llm.asked == 1
    assert asyncio.run(crowd(cached(llm, path))) == said and llm.asked == 1


def test_samples_without_a_seed_are_not_kept(llm: Counting) -> None:
    kept = cached(llm)

    async def twice() -> None:
        for _ in range(2):
            await kept.chat(Chat(ask("why?"), max_tokens=4, temperature=1.0))

    asyncio.run(twice())
    assert llm.asked == 2


def test_a_failure_is_asked_again(llm: Counting) -> None:
    kept, llm.failures = cached(llm), 1
    with pytest.raises(LLMError, match="this time"):
        asyncio.run(kept.chat(Chat(ask("why?"), max_tokens=4)))
    asyncio.run(kept.chat(Chat(ask("why?"), max_tokens=4)))
    asyncio.run(kept.chat(Chat(ask("why?"), max_tokens=4)))
    assert llm.asked == 2


def test_a_grade_is_found_again_under_another_secret(
    llm: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fence around quoted text differs from process to process; what it holds does not."""
    scorer = RubricScorer(cached(llm), ScorerConfig(grading="labels"))
    first = asyncio.run(scorer.grade("why?", "because", "# Good?"))
    monkeypatch.setattr(quoting, "_SECRET", b"that of another process")
    assert asyncio.run(scorer.grade("why?", "because", "# Good?")) == first
    assert llm.asked == 1
    asyncio.run(scorer.grade("why?", "therefore", "# Good?"))
    assert llm.asked == 2
