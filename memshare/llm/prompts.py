"""Few-shot chat prompts: memories become earlier turns, the best one nearest the question.

Texts go in as they are; the backends neutralise every message's content (`neutralise`), so that no
caller can forget to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from memshare.llm.base import LLM, ContextTooLong, Message


def few_shot(instruction: str, shots: Sequence[tuple[str, str]], question: str) -> list[Message]:
    """Instruction as system turn (if there is one), ``shots`` (best first), then the question."""
    conversation: list[Message] = [{"role": "user", "content": question}]
    if instruction:
        conversation.insert(0, {"role": "system", "content": instruction})
    return with_shots(conversation, shots)


def with_shots(conversation: Sequence[Message], shots: Sequence[tuple[str, str]]) -> list[Message]:
    """Put ``shots`` (best first) between a conversation's system turns and the rest.

    They appear in reverse: a model attends most to what stands nearest the question.
    """
    start = 0
    while start < len(conversation) and conversation[start]["role"] in ("system", "developer"):
        start += 1
    turns: list[Message] = []
    for prompt, answer in reversed(shots):
        turns.append({"role": "user", "content": prompt})
        turns.append({"role": "assistant", "content": answer})
    return [*conversation[:start], *turns, *conversation[start:]]


def fit_shots(
    llm: LLM,
    conversation: Sequence[Message],
    shots: Sequence[tuple[str, str]],
    max_tokens: int,
    extra: Mapping[str, Any] | None = None,
) -> tuple[list[Message], int]:
    """The prompt with as many of ``shots`` (best first) as fit, and how many those are.

    The least similar ones are dropped until prompt and ``max_tokens`` of answer fit the context.
    ``extra`` holds the request's further fields: see `LLM.count_tokens`. Raises `ContextTooLong` if
    they don't fit without any shot.
    """

    def counted(kept: int) -> tuple[list[Message], int]:
        messages = with_shots(conversation, shots[:kept])
        return messages, llm.count_tokens(messages, extra) + max_tokens

    limit = llm.context_length
    messages, tokens = counted(len(shots))
    if tokens <= limit:
        return messages, len(shots)
    # What is too long by itself may be very long: that is not counted again for every shot.
    bare, tokens = counted(0)
    if tokens > limit:
        raise ContextTooLong(llm.model, tokens, limit)
    for kept in range(len(shots) - 1, 0, -1):
        messages, tokens = counted(kept)
        if tokens <= limit:
            return messages, kept
    return bare, 0
