"""How memory enters a chat: which words are the question, and where the shots go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from memshare.gateway.errors import ApiError
from memshare.gateway.schemas import ChatMessage
from memshare.llm.base import LLM, Message, texts_of
from memshare.llm.prompts import fit_shots
from memshare.records import Memory


@dataclass(frozen=True, slots=True)
class Question:
    """The last user message's text; ``plain`` False if it has parts that are not text."""

    text: str
    plain: bool


def question_of(messages: Sequence[ChatMessage]) -> Question:
    """The question is the last user message: turns before it are context. 422 if there is none."""
    for message in reversed(messages):
        if message.role != "user":
            continue
        texts = texts_of(message.content)
        parts = 1 if isinstance(message.content, str) else len(message.content or ())
        return Question("\n".join(texts), len(texts) == parts)
    raise ApiError(422, "messages: a user message is needed", param="messages", code="no_question")


def compose(
    llm: LLM,
    messages: Sequence[ChatMessage],
    memories: Sequence[Memory],
    instruction: str,
    max_tokens: int,
    extra: Mapping[str, Any] | None = None,
) -> tuple[list[Message], list[Memory]]:
    """The chat that the LLM gets, and the memories (best first) that found room in it.

    System messages first (the agent's instruction where the client sent none), then the shots as
    whole turns, the best one last, then the conversation as it was sent. ``extra`` holds the
    request's further fields, tools among them. Blocking: it counts tokens. Raises `ContextTooLong`
    if the conversation alone is too long.
    """
    sent = [cast(Message, message.model_dump(exclude_unset=True)) for message in messages]
    if instruction and sent[0]["role"] not in ("system", "developer"):
        sent.insert(0, Message(role="system", content=instruction))
    if not memories:
        return sent, []  # nothing to make room for: the LLM itself judges the length
    shots = [(memory.prompt, memory.answer) for memory in memories]
    composed, kept = fit_shots(llm, sent, shots, max_tokens, extra)
    return composed, list(memories[:kept])


def answer_of(reply: Mapping[str, Any]) -> tuple[str, str, bool]:
    """Text, finish reason and whether tools are called, of a reply's first choice."""
    choice = next((item for item in reply["choices"] if item.get("index", 0) == 0), None)
    if choice is None:
        return "", "none", False
    message = choice.get("message") or {}
    tools = bool(message.get("tool_calls")) or choice.get("finish_reason") == "tool_calls"
    return "".join(texts_of(message.get("content"))), choice.get("finish_reason") or "none", tools
