"""Text becomes data: nothing in it can tokenise to a turn marker of the model.

A chat template writes turns with special tokens, and a tokenizer finds these tokens in ordinary
text too. A stored answer that contains ``<|im_end|>`` would end its own turn and open another.
Every message content therefore passes through `Neutraliser`, which breaks such strings with a
zero-width space: a reader sees the same text, the model sees no control token. Text without any
such string comes back as it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from memshare.llm.base import LLMError

BREAK = "\u200b"  # zero-width space: breaks a match, changes nothing a human sees
# Control strings of the common chat formats, refused even where this tokenizer does not know them:
# the same memory may be shown to another model later.
_KNOWN = (
    r"<[|｜][^<>\s]{1,64}[|｜]>",
    r"\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]",
    r"<</?SYS>>",
    r"</?s>",
    r"<(?:start|end)_of_turn>",
    r"<(?:bos|eos|pad|unk)>",
)
_KNOWN_PATTERN = re.compile("|".join(_KNOWN))
_BRACKETS = re.compile(r"[<>\[\]|｜]")


def has_control_string(text: str) -> bool:
    """Whether ``text`` has a control string of a common chat format in it, for whatever model."""
    return _KNOWN_PATTERN.search(text) is not None


def break_known(text: str) -> str:
    """``text`` with those strings broken: all that can be done where no tokenizer is at hand."""
    return _broken(_KNOWN_PATTERN, text)


def in_texts(content: Any, change: Callable[[str], str]) -> Any:
    """A message's content with ``change`` made to each text in it; the rest as it stands."""
    if isinstance(content, str):
        return change(content)
    if not isinstance(content, list):
        return content
    return [
        {**part, "text": change(part["text"])}
        if isinstance(part, dict) and isinstance(part.get("text"), str)
        else part
        for part in content
    ]


def _broken(pattern: re.Pattern[str], text: str) -> str:
    # A replacement can't create a match inside itself, but two matches may share characters.
    for _ in range(8):
        broken = pattern.sub(lambda match: match[0][0] + BREAK + match[0][1:], text)
        if broken == text:
            break
        text = broken
    return text


def is_control(content: str, special: bool) -> bool:
    """Whether an added token steers the model, rather than being a piece of ordinary text.

    Some tokenizers add runs of blanks, or declare "!" as padding; breaking those would change
    ordinary text and protect nothing.
    """
    if len(content) < 2 or not content.strip():
        return False
    return special or bool(_BRACKETS.search(content))


class Neutraliser:
    """Breaks control strings in text for one tokenizer.

    ``tokenizer`` is a Hugging Face tokenizer; its added tokens that are control tokens are found
    by `is_control`. Results are remembered, since the same shots are shown again and again.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        tokens = {i: t for i, t in tokenizer.added_tokens_decoder.items()}
        special = set(tokenizer.all_special_ids)
        control = {
            i: t.content
            for i, t in tokens.items()
            if is_control(t.content, t.special or i in special)
        }
        self.control_ids = frozenset(control)
        own = sorted((re.escape(text.strip()) for text in control.values()), key=len, reverse=True)
        self._pattern = re.compile("|".join([*own, *_KNOWN]))
        self._cached = lru_cache(maxsize=8192)(self._neutralise)

    def __call__(self, text: str) -> str:
        """``text`` with every control string broken; equal to ``text`` if there is none.

        Raises `LLMError` for text that no tokenizer takes (lone surrogates), or whose control
        tokens can't be broken.
        """
        return self._cached(text)

    def _neutralise(self, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise LLMError(f"text is not valid Unicode: {error}") from None
        text = _broken(self._pattern, text)
        # What the tokenizer's own normaliser maps to a control token (full-width forms, or a
        # dropped zero-width space) shows only in its output.
        for breaker in (BREAK, " ", " "):
            spans = self._control_spans(text)
            if not spans:
                return text
            for start, _ in reversed(spans):
                text = text[: start + 1] + breaker + text[start + 1 :]
        if self._control_spans(text):
            raise LLMError("text contains a control token that can't be broken; remove it")
        return text

    def _control_spans(self, text: str) -> list[tuple[int, int]]:
        """Character spans, in order, that the tokenizer reads as control tokens."""
        if not self.control_ids:
            return []
        encoded = self._tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=self._tokenizer.is_fast,
            return_attention_mask=False,
            verbose=False,
        )
        hits = [i for i, token in enumerate(encoded["input_ids"]) if token in self.control_ids]
        if not hits:
            return []
        if not self._tokenizer.is_fast:
            raise LLMError("text contains a control token; a fast tokenizer is needed to break it")
        return [tuple(encoded["offset_mapping"][i]) for i in hits]
