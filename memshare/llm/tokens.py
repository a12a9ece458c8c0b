"""From chat messages to token ids: template, control tokens, and the span of a continuation."""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memshare.llm.base import ContextTooLong, LLMError, LLMUnavailable, Message, texts_of
from memshare.llm.neutralise import Neutraliser, in_texts
from memshare.progress import log

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})


@dataclass(frozen=True, slots=True)
class Span:
    """Token ids of context and continuation; the continuation is ``ids[start:]``, never empty."""

    ids: list[int]
    start: int


class ChatTokenizer:
    """A model's tokenizer and chat template, behind which all text is data.

    ``model`` is a folder or a hub name. Thread-safe. Raises `LLMUnavailable` without tokenizer (the
    hub may be away) or chat template.
    """

    def __init__(self, model: str) -> None:
        from transformers import AutoTokenizer

        self.model = model
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError, KeyError) as error:
            raise LLMUnavailable(
                f"{model}: no tokenizer can be loaded from there: {error}"
            ) from error
        if not self.tokenizer.chat_template:
            raise LLMUnavailable(
                f"{model}: its tokenizer has no chat template; an instruct model is needed"
            )
        self._lock = threading.Lock()  # a fast tokenizer must not be borrowed by two threads
        self._neutralise = Neutraliser(self.tokenizer)
        self.control_ids = self._neutralise.control_ids
        # What the function itself has parameters for (another template, say) is not a client's.
        self._ours = frozenset(inspect.signature(self.tokenizer.apply_chat_template).parameters)
        self._takes_parts = self._renders_parts()
        if not self.control_ids.intersection(self.prompt_ids([{"role": "user", "content": "x"}])):
            log(f"warning: {model}: turns are marked by plain text, which a memory can imitate")

    def neutralise(self, text: str) -> str:
        """``text`` with control tokens broken; see `Neutraliser`."""
        with self._lock:
            return self._neutralise(text)

    def clean(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The messages with every text in them neutralised; other fields as they stand.

        Raises `LLMError` for no message, an unknown role, or content that isn't text (or a list of
        content parts).
        """
        if not messages:
            raise LLMError("no messages")
        return [self._clean_message(message) for message in messages]

    def _clean_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        cleaned = dict(message)
        # A template writes the role into the header unescaped, so it may not be free text.
        if cleaned.get("role") not in ROLES:
            raise LLMError(
                f"unknown role {cleaned.get('role')!r}; known: {', '.join(sorted(ROLES))}"
            )
        content = cleaned.get("content")
        if isinstance(content, str | list):
            cleaned["content"] = in_texts(content, self.neutralise)
        elif content is not None:
            raise LLMError(f"a message's content must be text, not {type(content).__name__}")
        return cleaned

    def render(self, messages: Sequence[Message], extra: Mapping[str, Any] | None = None) -> str:
        """The prompt as text: cleaned messages and the header of the assistant's reply.

        As vLLM does it: where the template takes strings alone, text parts become one text, a line
        each, and no content an empty one; arguments of tool calls are objects; of a request's
        ``extra`` fields, ``tools`` and ``chat_template_kwargs`` go to the template. Raises
        `LLMError` for what it refuses.
        """
        cleaned = [_with_arguments(message) for message in self.clean(messages)]
        if not self._takes_parts:
            cleaned = [{**message, "content": self._flat(message)} for message in cleaned]
        return self._apply(cleaned, extra or {})

    def _apply(self, messages: list[dict[str, Any]], extra: Mapping[str, Any]) -> str:
        from jinja2 import TemplateError

        try:
            given = (extra.get("chat_template_kwargs") or {}).items()
            rendered: str = self.tokenizer.apply_chat_template(
                messages,
                tools=extra.get("tools") or None,
                tokenize=False,
                add_generation_prompt=True,
                **{name: value for name, value in given if name not in self._ours},
            )
        # A template runs on what a client sent: a wrong type in there is a refusal too.
        except (TemplateError, TypeError, ValueError, AttributeError, KeyError) as error:
            raise LLMError(
                f"{self.model}: its chat template refuses the messages: {error}"
            ) from error
        return rendered

    def _renders_parts(self) -> bool:
        """Whether the template makes of a text part what it makes of the text."""
        parts = [{"type": "text", "text": "x"}]
        try:
            both = [self._apply([{"role": "user", "content": said}], {}) for said in ("x", parts)]
        except LLMError:
            return False
        return both[0] == both[1]

    def _flat(self, message: Mapping[str, Any]) -> str:
        content = message.get("content")
        texts = texts_of(content)
        if isinstance(content, list) and len(texts) < len(content):
            raise LLMError(f"{self.model}: its chat template takes nothing but text")
        return "\n".join(texts)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; nothing is added."""
        with self._lock:
            ids: list[int] = self.tokenizer(
                text, add_special_tokens=False, return_attention_mask=False, verbose=False
            )["input_ids"]
        return ids

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the rendered prompt."""
        return self.encode(self.render(messages))

    def count(self, messages: Sequence[Message], extra: Mapping[str, Any] | None = None) -> int:
        """Tokens of the rendered prompt, generation header included; ``extra`` as `render`'s."""
        return len(self.encode(self.render(messages, extra)))

    def span(self, context: Sequence[Message], continuation: str, limit: int) -> Span:
        """Ids of ``context`` and of ``continuation`` as its reply (no end-of-turn token).

        Both are tokenised apart, as they are when the model writes, so that the span is exact.
        One token of ``limit`` stays free: vLLM must generate one to return prompt logprobs, and
        both backends refuse the same texts. Raises `ContextTooLong`, and `LLMError` if the
        continuation has no tokens.
        """
        head = self.prompt_ids(context)
        tail = self.encode(self.neutralise(continuation))
        if not tail:
            raise LLMError("the continuation is empty: it has no likelihood")
        if len(head) + len(tail) + 1 > limit:
            raise ContextTooLong(self.model, len(head) + len(tail) + 1, limit)
        return Span(head + tail, len(head))

    def label_ids(self, labels: Sequence[str]) -> tuple[list[int], list[int]]:
        """Ids that tell the labels apart: a prefix they share, and each one's next id.

        Some tokenizers write a blank before any first word; that is the shared prefix. Raises
        `LLMError` if two labels start with the same token.
        """
        encoded = [self.encode(label) for label in labels]
        if not encoded or not all(encoded):
            raise LLMError(f"labels must be non-empty texts: {list(labels)}")
        shared = 0
        if len(encoded) > 1:
            shortest = min(map(len, encoded))
            while shared < shortest - 1 and len({ids[shared] for ids in encoded}) == 1:
                shared += 1
        first = [ids[shared] for ids in encoded]
        if len(set(first)) != len(first):
            raise LLMError(f"{self.model}: labels start with the same token: {list(labels)}")
        return encoded[0][:shared], first

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids without special tokens."""
        text: str = self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


def _with_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its tool calls as templates expect them, which vLLM makes of OpenAI's form.

    Arguments are an object and not its JSON text, an empty one for what is none; no calls are no
    field. Calls of another form stay, for the template to refuse.
    """
    if message["role"] != "assistant" or "tool_calls" not in message:
        return message
    calls = message["tool_calls"]
    if not calls:
        return {name: value for name, value in message.items() if name != "tool_calls"}
    if isinstance(calls, list):
        calls = [_parsed(call) for call in calls]
    return {**message, "tool_calls": calls}


def _parsed(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):  # a model wrote it; the conversation must go on
            arguments = None
    if not isinstance(arguments, dict):
        arguments = {}
    return {**call, "function": {**function, "arguments": arguments}}
