from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memshare.retrieval.text import memory_text, tokenize


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", []),
        (" \n\t ... !?", []),
        ("Hello, WORLD! 42", ["hello", "world", "42"]),
        ("the the The", ["the", "the", "the"]),
        ("snake_case re-use don't", ["snake", "case", "re", "use", "don", "t"]),
        ("ÜBER Straße ΣΟΦΙΑ", ["über", "straße", "σοφια"]),
        ("春眠不觉晓", ["春眠", "眠不", "不觉", "觉晓"]),
        ("春", ["春"]),
        (
            "床前明月光,疑是地上霜。",
            ["床前", "前明", "明月", "月光", "疑是", "是地", "地上", "上霜"],
        ),
        ("ひらがなカナ", ["ひら", "らが", "がな", "なカ", "カナ"]),
        ("ラーメン", ["ラー", "ーメ", "メン"]),
        ("ﾊﾝｶｸ", ["ハン", "ンカ", "カク"]),
        ("안녕하세요 나", ["안녕", "녕하", "하세", "세요", "나"]),
        ("人々", ["人々"]),
        ("GPT4模型v2", ["gpt4", "模型", "v2"]),
        ("ＡＢＣ１２", ["abc12"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("𠮷野家", ["𠮷野", "野家"]),
        ("naïve", ["naïve"]),
        ("\ud800x", ["x"]),
    ],
)
def test_words_and_bigrams(text: str, tokens: list[str]) -> None:
    assert tokenize(text) == tokens


@given(st.text())
def test_unicode_form_makes_no_difference(text: str) -> None:
    assert tokenize(unicodedata.normalize("NFC", text)) == tokenize(
        unicodedata.normalize("NFD", text)
    )


@given(st.text(alphabet=st.characters(max_codepoint=127)))
def test_case_makes_no_difference(text: str) -> None:
    assert tokenize(text.upper()) == tokenize(text)


@given(st.text(alphabet=st.characters(codec="utf-8")))
def test_tokens_hold_no_space_and_survive_their_own_tokenizing(text: str) -> None:
    for token in tokenize(text):
        assert token
        assert not any(c.isspace() for c in token)
        assert tokenize(token) == [token]


def test_memory_text_is_prompt_newline_answer() -> None:
    assert memory_text("a?", "b") == "a?\nb"
