"""Where memory goes in a chat, and which words are the question."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from memshare.config import LLMConfig
from memshare.gateway.errors import ApiError
from memshare.gateway.prompt import Question, answer_of, compose, question_of
from memshare.gateway.schemas import ChatMessage
from memshare.llm.base import LLM
from memshare.llm.hf import TransformersBackend
from memshare.records import Memory
from tests.tiny_lm import tiny_lm


def chat(*turns: tuple[str, Any], **extra: Any) -> list[ChatMessage]:
    return [ChatMessage(role=role, content=content, **extra) for role, content in turns]


def memory(number: int, answer: str = "fine") -> Memory:
    return Memory(
        f"id{number}", "p", f"question {number}", answer, None, None, None, "2026", {}, number
    )


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tiny_lm(tmp_path_factory.mktemp("lm"))
    yield TransformersBackend(str(folder), LLMConfig(model=str(folder), device="cpu"))


def test_question_is_the_last_user_message() -> None:
    turns = chat(("user", "old"), ("assistant", "x"), ("user", "new"), ("assistant", "tool?"))
    assert question_of(turns) == Question("new", True)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert question_of(chat(("user", parts))) == Question("a\nb", True)
    image = [*parts, {"type": "image_url", "image_url": {"url": "x"}}]
    assert question_of(chat(("user", image))) == Question("a\nb", False)
    assert question_of(chat(("user", None))) == Question("", True)
    with pytest.raises(ApiError, match="user message"):
        question_of(chat(("system", "be kind")))


def test_shots_stand_between_system_and_conversation_best_nearest(llm: LLM) -> None:
    turns = chat(
        ("system", "be kind"), ("user", "old"), ("assistant", "x"), ("user", "new"), name="n"
    )
    messages, kept = compose(llm, turns, [memory(1), memory(2)], "instruction", 8)
    assert [(m["role"], m["content"]) for m in messages] == [
        ("system", "be kind"),
        ("user", "question 2"),
        ("assistant", "fine"),
        ("user", "question 1"),
        ("assistant", "fine"),
        ("user", "old"),
        ("assistant", "x"),
        ("user", "new"),
    ]
    assert messages[-1]["name"] == "n"  # type: ignore[typeddict-item]
    assert [item.id for item in kept] == ["id1", "id2"]


def test_instruction_stands_in_for_a_missing_system_message(llm: LLM) -> None:
    messages, _ = compose(llm, chat(("user", "q")), [], "be brief", 8)
    assert messages == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "q"},
    ]


def test_worst_shots_give_way_to_the_answer(llm: LLM) -> None:
    long = "so it goes and goes " * 10
    shots = [memory(1, long), memory(2, long), memory(3, long)]
    messages, kept = compose(llm, chat(("user", "q")), shots, "", 64)
    assert 0 < len(kept) < 3
    assert [item.id for item in kept] == ["id1", "id2"][: len(kept)]
    assert llm.count_tokens(messages) + 64 <= llm.context_length


def test_answer_of_the_first_choice() -> None:
    def reply(**choice: Any) -> dict[str, Any]:
        other = {"index": 1, "message": {"content": "other"}, "finish_reason": "stop"}
        return {"choices": [other, {"index": 0, **choice}]}

    said = reply(message={"content": "hi"}, finish_reason="stop")
    assert answer_of(said) == ("hi", "stop", False)
    called = reply(message={"content": None, "tool_calls": [{}]}, finish_reason="stop")
    assert answer_of(called) == ("", "stop", True)
    assert answer_of({"choices": []}) == ("", "none", False)
