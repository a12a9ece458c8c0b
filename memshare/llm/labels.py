"""A number read from an LLM without generating: the expected value over ten digit labels.

Digits are single tokens in every common tokenizer and never start alike, unlike "1" and "10".
"""

from __future__ import annotations

from collections.abc import Sequence

from memshare.llm.base import LLM, Message

DIGITS = tuple("0123456789")


async def expected_fraction(llm: LLM, messages: Sequence[Message]) -> float:
    """Expected digit of the reply's first token, as a fraction 0..1 of nine."""
    probabilities = await llm.label_probabilities(messages, DIGITS)
    return sum(p * i for i, p in enumerate(probabilities)) / (len(DIGITS) - 1)
