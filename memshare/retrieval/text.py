"""Words for BM25, and the one text that stands for a memory."""

from __future__ import annotations

import re
import sys
import unicodedata
from functools import cache

from memshare.records import unicode_form

# Scripts written without spaces, or (hangul) with endings glued on: character bigrams match better
# than words there (McNamee & Mayfield 2004). Full- and half-width forms are folded by NFKC first.
_CJK = (
    "\u3005\u3007"  # iteration mark, ideographic zero
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"  # Han
    "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\U0001aff0-\U0001b16f"  # kana
    "\u1100-\u11ff\u3131-\u318e\ua960-\ua97c\uac00-\ud7a3\ud7b0-\ud7fb"  # hangul
)


@cache
def _pattern() -> re.Pattern[str]:
    """Runs of CJK characters (group 1), or words of other scripts with their combining marks."""
    marks: list[str] = []
    start: int | None = None
    # Planes 0 and 1 hold every script's marks; plane 14's variation selectors are no part of words.
    for code in range(min(sys.maxunicode + 1, 0x20000) + 1):
        is_mark = code < 0x20000 and unicodedata.category(chr(code))[0] == "M"
        if is_mark and start is None:
            start = code
        elif not is_mark and start is not None:
            marks.append(f"{chr(start)}-{chr(code - 1)}")
            start = None
    # Without the marks, `\w` would cut Hindi or Thai words at every vowel sign.
    letter = rf"(?![{_CJK}])[^\W_]"
    return re.compile(rf"([{_CJK}]+)|(?:{letter})(?:{letter}|[{''.join(marks)}])*")


def tokenize(text: str) -> list[str]:
    """Lower-cased Unicode words in order of appearance, repeats kept.

    Runs of Han, kana and hangul become character bigrams; a lone character is itself. Text is
    folded by NFKC, so composed, decomposed and full-width forms agree.
    """
    folded = unicode_form("NFKC", unicode_form("NFKC", text).lower())
    tokens: list[str] = []
    for match in _pattern().finditer(folded):
        run = match.group(1)
        if run is None:
            tokens.append(match.group())
        elif len(run) == 1:
            tokens.append(run)
        else:
            tokens.extend(run[i : i + 2] for i in range(len(run) - 1))
    return tokens


def memory_text(prompt: str, answer: str) -> str:
    """The text that stands for a memory in BM25 and in the encoder: prompt, newline, answer."""
    return f"{prompt}\n{answer}"
