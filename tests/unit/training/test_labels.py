"""What a candidate is worth by chat: what is asked, and which answers measure nothing."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from memshare.config import Config, LLMConfig, load_config
from memshare.llm.base import LLMError, LLMUnavailable
from memshare.pool.store import PoolStore
from memshare.records import Grade, Memory, NewMemory
from memshare.training import labels
from memshare.training.labels import label_key, open_labeller, same_label
from tests.training_runs import ROOT, load_program


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PoolStore]:
    """A pool of five memories; no LLM is opened."""

    async def opened(stack: AsyncExitStack, llm: LLMConfig) -> SimpleNamespace:
        return SimpleNamespace(model=llm.model)

    monkeypatch.setattr(labels, "_open", opened)
    with PoolStore.open(f"sqlite:///{tmp_path / 'pool.db'}") as store:
        store.create_pool("main")
        answers = ("own", "two words", "long", "huge", "odd")
        store.append([NewMemory("main", f"q{i}", answer) for i, answer in enumerate(answers)])
        yield store


def measured(
    kind: str, store: PoolStore, query: Memory, *candidates: Memory | None
) -> tuple[bool, list[float | None]]:
    """Whether there is a baseline, and what each candidate is worth."""
    config: Config = load_config(None, [f"mining.labels={kind}"])

    async def run() -> tuple[bool, list[float | None]]:
        async with open_labeller(config, store) as labeller:
            assert labeller.measure is not None
            worth = [await labeller.measure(query, candidate) for candidate in candidates]
            assert labeller.calls() == len(candidates)
            return labeller.has_baseline, worth

    return asyncio.run(run())


class Echo:
    """An agent that repeats the question and what it was shown; "huge" does not fit its prompt."""

    def __init__(self, *_: Any) -> None:
        pass

    async def answer(self, question: str, shown: list[Memory], seed: int) -> SimpleNamespace:
        text = " ".join([question, *(memory.answer for memory in shown)])
        used = [memory.id for memory in shown if memory.answer != "huge"]
        return SimpleNamespace(text=text, cut_off="long" in text, used=used)


class Counts:
    """A scorer that gives ten points a word; of "odd" it can make nothing."""

    async def grade(self, prompt: str, answer: str, rubric: str) -> Grade:
        return Grade(None if "odd" in answer else 10.0 * len(answer.split()), "it is odd")


def test_a_reward_is_the_grade_of_an_answer_that_is_whole_and_was_shown_the_candidate(
    store: PoolStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(labels, "Agent", Echo)
    monkeypatch.setattr(labels, "make_scorer", lambda *_: Counts())
    query, *others = store.iter("main")
    baseline, worth = measured("reward", store, query, None, *others, others[-1])
    assert worth.pop() is None and capsys.readouterr().err.count("graded: it is odd\n") == 1
    assert baseline and worth == [pytest.approx(0.1), pytest.approx(0.3), None, None, None]


def test_a_reward_by_known_answers_asks_no_scorer_llm(
    store: PoolStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """serve/llm.py starts none for it. Nor is a rubric read of a pool that is served no more."""
    opened = []

    async def open_(_: AsyncExitStack, llm: LLMConfig) -> SimpleNamespace:
        opened.append(llm.model)
        return SimpleNamespace(model=llm.model)

    monkeypatch.setattr(labels, "_open", open_)
    monkeypatch.setattr(labels, "make_scorer", lambda config, llm: (config.kind, llm))
    store.create_pool("elsewhere", rubric="/gone/rubric.md")
    sets = ["mining.labels=reward", "agent_llm.model=agent"]

    async def name(*more: str) -> str:
        async with open_labeller(load_config(None, [*sets, *more]), store) as labeller:
            return labeller.scorer

    assert asyncio.run(name("scorer.kind=reference")) == "reference" and opened == ["agent"]
    assert asyncio.run(name()) == "pocket" and opened[1:] == ["agent", "pocket"]
    assert asyncio.run(name("scorer_llm.model=agent")) == "agent" and opened[3:] == ["agent"]


def test_a_bare_answer_that_nobody_can_use_is_worth_nothing(
    store: PoolStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or what helps out of that would have no baseline to beat, and any candidate would be good."""
    monkeypatch.setattr(labels, "Agent", Echo)
    monkeypatch.setattr(labels, "make_scorer", lambda *_: Counts())
    query, other, *_ = store.iter("main")
    for unusable in ("a long", "an odd"):
        asked = replace(query, prompt=f"{unusable} question")
        _, (bare, shown) = measured("reward", store, asked, None, other)
        assert (bare, shown) == (0.0, None)


def test_prompted_is_the_log_of_what_the_scorer_states(
    store: PoolStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    class Stated:
        def __init__(self, *_: Any) -> None:
            pass

        async def score(self, *what: Any) -> float:
            asked.append(what)
            return {"two words": 0.25, "long": 0.0}.get(what[2][0][1], 0.5)

    monkeypatch.setattr(labels, "Prompted", Stated)
    query, *others = store.iter("main")
    baseline, worth = measured("prompted", store, query, *others)
    assert not baseline
    half = math.log(0.5)
    assert worth == [math.log(0.25), pytest.approx(math.log(1e-6)), half, half]
    assert asked[0] == ("q0", "own", [("q1", "two words")])


def test_a_text_that_the_llm_refuses_is_not_measured(
    store: PoolStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A content filter, say. An LLM that refuses any text would leave a round without labels."""

    class Filtered:
        refused = "odd"

        def __init__(self, *_: Any) -> None:
            pass

        async def score(self, query: str, answer: str, shots: list[tuple[str, str]]) -> float:
            if Filtered.refused in shots[0][1]:
                raise Filtered.error
            return 1.0

        error = LLMError("status 400: filtered")

    monkeypatch.setattr(labels, "Prompted", Filtered)
    query, *others = store.iter("main")
    assert measured("prompted", store, query, *others, others[-1])[1] == [0, 0, 0, None, None]
    assert capsys.readouterr().err.count("what is refused is not measured") == 1
    Filtered.error = LLMUnavailable("away")
    with pytest.raises(LLMUnavailable):
        measured("prompted", store, query, *others)
    Filtered.refused, Filtered.error = "", LLMError("status 400: no logprobs here")
    with pytest.raises(LLMError, match="no logprobs"):
        measured("prompted", store, query, *others)


@pytest.mark.parametrize(
    "program", ["train/mine.py", "train/continual.py", "train/index.py", "serve/up.py"]
)
def test_likelihoods_that_an_endpoint_does_not_give_are_refused_before_anything_starts(
    program: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And not once the pool is encoded. A gateway, which never mines, takes these settings."""
    sets = [f"run.dir={tmp_path / 'run'}", "scorer_llm.backend=openai"]
    assert load_config(None, sets).mining.labels == "likelihood"
    words = [word for each in sets for word in ("--set", each)]
    assert load_program(ROOT / program).main(words) == 2
    assert "mining.labels: backend openai of scorer_llm" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*/"))


def test_the_gate_and_the_trainers_mask_have_one_idea_of_a_label(tmp_path: Path) -> None:
    told = [1, 1.0, True, "1", None, {"a": 1, "b": 2}, {"b": 2, "a": 1}]
    mining = load_config(None, ["mining.labels=given"]).mining
    with PoolStore.open(f"sqlite:///{tmp_path / 'pool.db'}") as store:
        store.create_pool("main")
        store.append(
            NewMemory("main", f"q{place}", f"a{place}", metadata={"label": label})
            for place, label in enumerate(told)
        )
        rows = list(store.iter("main"))
    same = [[same_label(one, other, "label") for other in rows] for one in rows]
    keys = [label_key(row, mining) for row in rows]
    assert same == [[one == other for other in keys] for one in keys]
    assert [sum(row) for row in same] == [1, 1, 1, 1, 1, 2, 2]
