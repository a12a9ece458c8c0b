from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from memshare.config import AgentConfig
from memshare.llm.agent import Agent
from memshare.llm.base import ContextTooLong, Message
from memshare.llm.hf import TransformersBackend
from memshare.llm.prompts import few_shot, fit_shots, with_shots
from memshare.records import Memory


def _memory(number: int, answer: str) -> Memory:
    return Memory(
        id=f"m{number}", pool="p", prompt=f"question {number}", answer=answer, score=None,
        agent=None, model=None, created_at="2026-01-01T00:00:00Z", metadata={}, seq=number,
    )  # fmt: skip


def test_the_best_shot_stands_next_to_the_question() -> None:
    assert few_shot("rules", [("best", "1"), ("worse", "2")], "now") == [
        {"role": "system", "content": "rules"},
        {"role": "user", "content": "worse"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "best"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "now"},
    ]
    assert few_shot("", [], "now") == [{"role": "user", "content": "now"}]


def test_shots_go_between_system_turns_and_a_conversation() -> None:
    talk = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u1"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "u2"},
    ]
    mixed = with_shots(talk, [("q", "a")])  # type: ignore[arg-type]
    assert [m["content"] for m in mixed] == ["s", "q", "a", "u1", "a1", "u2"]


def test_the_least_similar_shots_are_dropped_first(backend: TransformersBackend) -> None:
    shots = [(f"q{i}", "verse " * 150) for i in range(6)]
    bare = few_shot("", [], "now")
    messages, kept = fit_shots(backend, bare, shots, 100)
    assert 0 < kept < 6
    assert messages == few_shot("", shots[:kept], "now")
    assert backend.count_tokens(messages) + 100 <= backend.context_length
    assert backend.count_tokens(few_shot("", shots[: kept + 1], "now")) + 100 > 2048
    assert fit_shots(backend, bare, [], 100) == (bare, 0)


def test_a_question_too_long_by_itself_is_refused(
    backend: TransformersBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    count = backend.count_tokens

    def counting(messages: Sequence[Message], extra: Mapping[str, Any] | None = None) -> int:
        counted.append(len(messages))
        return count(messages, extra)

    monkeypatch.setattr(backend, "count_tokens", counting)
    with pytest.raises(ContextTooLong) as caught:
        fit_shots(backend, few_shot("", [], "w " * 3000), [("q", "a")] * 9, 10)
    assert caught.value.tokens > caught.value.limit == 2048
    assert counted == [19, 1]  # and not for each shot that is left out: it may be a megabyte


def test_agent_names_the_memories_it_showed(backend: TransformersBackend) -> None:
    agent = Agent(backend, AgentConfig(instruction="be brief", max_tokens=5))
    memories = [_memory(1, "short"), _memory(2, "long " * 2000), _memory(3, "short")]
    answer = asyncio.run(agent.answer("why?", memories, seed=1))
    assert answer.used == ["m1"]
    for reason in ("stop", "length", "content_filter"):
        ended = replace(answer, completion=replace(answer.completion, finish_reason=reason))
        assert ended.cut_off == (reason != "stop")
    assert asyncio.run(agent.answer("why?", memories[:1])).used == ["m1"]
    assert asyncio.run(agent.answer("why?", [])).used == []
