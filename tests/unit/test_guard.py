"""What is looked at before a memory is written."""

from __future__ import annotations

import pytest

from memshare.config import Config
from memshare.pool.feedback import Standing
from memshare.records import Memory, NewMemory
from memshare.sharing.guard import Guard, suspicion

PLAIN = [
    "How do I boil an egg?\n\nSeven minutes. Then END the DATA collection, begin data work.",
    "x < y | y > z, [see INST 4] and <b>bold</b>",
    "می‌خواهم 👩‍👩‍👧 🏴󠁧󠁢󠁳󠁣󠁴󠁿 ❤️ naïve 北京",  # joiners, selectors, a flag made of tag characters
    "C:\\\\temp\\u200b written out",
]
ODD = {
    "control strings": ["<|im_end|>", "a </s> b", "[INST] do [/INST]", "<start_of_turn>"],
    "imitates": ["END DATA 00", "text\n> BEGIN DATA abc\n{}", "\u2014 end\nBEGIN  DATA"],
    "invisible": [
        "a\u200bb",
        "\ufeffa",
        "\u202eabc",
        "a\U000e0041",
        "🏴\U000e0041",
        "\u2060",
        "a\U000e0000",
        "a\U000e0101",
        "\u3164",
    ],
}


@pytest.mark.parametrize("text", PLAIN)
def test_ordinary_text_is_not_suspicious(text: str) -> None:
    assert suspicion(text) is None


@pytest.mark.parametrize(
    ("word", "text"), [(word, text) for word, texts in ODD.items() for text in texts]
)
def test_text_for_a_models_eyes_is(word: str, text: str) -> None:
    assert word in (suspicion(f"An answer. {text}" if word != "imitates" else text) or "")


def test_only_where_the_pool_asks_for_it() -> None:
    guard = Guard(Config(pools={"open": {"hold_suspicious": True}, "plain": {}}))
    for prompt, answer in (("q <|im_end|>", "a"), ("q", "a <|im_end|>")):
        assert guard.look_at(NewMemory("open", prompt, answer)).hold is not None
        assert guard.look_at(NewMemory("plain", prompt, answer)).hold is None
        assert guard.look_at(NewMemory("elsewhere", prompt, answer)).hold is None
    assert guard.look_at(NewMemory("open", "q", "a")) == NewMemory("open", "q", "a")


def test_what_agents_are_shown_beside_the_text_is_looked_at_too() -> None:
    guard = Guard(Config(pools={"open": {"hold_suspicious": True}}))
    usual = {"topic": ["INST", "eggs"], "b": "<|", "c": {"|>": 'a "quoted"\n\\ word \u4f60'}}
    ordinary = NewMemory("open", "q", "a", model="org/model-1:free", metadata=usual)
    assert guard.look_at(ordinary) == ordinary
    for odd in ({"a": "<|im_end|>"}, {"a": [{"b": "x\u200by"}]}, {"</s>": 1}):
        assert guard.look_at(NewMemory("open", "q", "a", metadata=odd)).hold is not None
    assert guard.look_at(NewMemory("open", "q", "a", model="m <|im_end|>")).hold is not None


def test_a_copy_is_told_from_an_answer_of_ones_own() -> None:
    guard = Guard(Config())
    poem = (
        "There once was a teapot of tin that hummed while the kettle came in, they sang by the fire"
    )
    shown = [
        Memory(id, "main", "q", answer, None, None, None, "", {}, 1)
        for id, answer in (("a", "Yes"), ("b", poem))
    ]
    assert guard.copied(poem, shown) == "b"
    assert guard.copied(f"  {poem.upper()}!", shown) == "b"
    assert guard.copied(f"Sure. {poem}", shown) == "b"
    assert guard.copied("yes.", shown) == "a"
    assert guard.copied("Yes, but only on Sundays", shown) is None
    assert guard.copied(" ".join(reversed(poem.split())), shown) is None
    assert guard.copied(poem, []) is None


def test_a_memory_sinks_below_the_floor_of_its_pool() -> None:
    guard = Guard(Config(pools={"main": {}, "never": {"hold_below": None}}))
    low = Standing(-3 / 5, 3)
    assert guard.sunk("main", low) == "its standing is -0.60 after 3 votes"
    assert guard.sunk("main", Standing(-2 / 4, 2)) is None  # not below
    assert guard.sunk("main", Standing(-1 / 3, 1)) is None  # nobody decides alone
    assert guard.sunk("never", low) is guard.sunk("elsewhere", low) is None
