"""No text makes the gateway stand still: what it does to texts is linear in their length.

Python's regular expressions and Unicode tables hold every thread up while they are at work. What is
quadratic takes seconds for the longest memory, and minutes for the longest chat, of anybody who has
a key.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from memshare.llm.neutralise import break_known
from memshare.llm.quoting import quote
from memshare.llm.scorer import said_once
from memshare.pool.validate import MAX_TEXT_CHARS, check_metadata
from memshare.records import normalise
from memshare.retrieval.text import tokenize
from memshare.sharing.guard import suspicion
from memshare.training.split import grams

SECONDS = 1.0  # quadratic: 5 and more; linear: hundredths
CHARS = 2 * MAX_TEXT_CHARS
UNITS = {
    "blanks": " ", "lines": "\n", "points": ".\n", "backslashes": "\\", "quotes": '"',
    "letters": "a", "han": "\u4f60", "symbols": "\u2500", "invisible": "\u200b",
    "marks": "\u0301\u0316", "kana marks": "\u0301\uff9e", "piles": "\u0301\u0316" * 99 + "a",
    "flags": "\U0001f3f4\U000e0061", "fences": "\nBEGIN", "fences apart": "BEGIN \n",
    "tokens": "<|", "instructions": "[INST",
}  # fmt: skip
WORK: dict[str, Callable[[str], Any]] = {
    "normalise": normalise, "suspicion": suspicion, "said_once": said_once, "grams": grams,
    "break_known": break_known, "quote": lambda text: quote({"question": text}),
    "check_metadata": lambda text: check_metadata({"a": text}, 10 * CHARS), "tokenize": tokenize,
}  # fmt: skip


@pytest.mark.parametrize("work", WORK)
def test_no_text_takes_long(work: str) -> None:
    for name, unit in UNITS.items():
        many = unit * (CHARS // len(unit))
        for text in (f"a{many}", f"{many}a", f"a{many}\u200b"):
            began = time.perf_counter()
            WORK[work](text)
            assert time.perf_counter() - began < SECONDS, name


def test_ordinary_marks_are_folded_and_piles_of_them_are_left() -> None:
    above, below = "\u0301", "\u0316"
    marks = (above + below) * 60
    assert normalise(f"Cafe\u0301 {marks}") == normalise(f"caf\u00e9 {below * 60}{above * 60}")
    assert tokenize("Cafe\u0301") == tokenize("caf\u00e9")
    assert normalise(f"E\u0301 {marks * 9}") == f"e\u0301 {marks * 9}"
