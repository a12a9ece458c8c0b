"""The one protocol every LLM backend follows, and what it can raise."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypedDict


class Message(TypedDict):
    """One chat turn; ``role`` is system, user or assistant."""

    role: str
    content: str


# How what isn't in a reply, or is of another form there, shows when it is read.
ODD = (LookupError, TypeError, AttributeError, ValueError, OverflowError)


def texts_of(content: Any) -> list[str]:
    """The texts in a message's content: the one that it is, or those of its text parts."""
    if isinstance(content, str):
        return [content]
    parts = [part for part in content or () if isinstance(part, dict)]
    return [part["text"] for part in parts if isinstance(part.get("text"), str)]


class LLMError(RuntimeError):
    """The LLM refused a request (a 4xx, a context too long): repeating it won't help."""


class ContextTooLong(LLMError):
    """Prompt and answer together don't fit the model; ``tokens`` were asked for, ``limit`` fit."""

    def __init__(self, model: str, tokens: int, limit: int) -> None:
        super().__init__(
            f"{model}: {tokens} tokens are too long, its context holds {limit}; shorten the text"
        )
        self.tokens = tokens
        self.limit = limit


class LLMUnavailable(LLMError):
    """The LLM can't be reached, stayed mute after every retry, or is set up wrongly.

    That is no fault of the request, which may succeed later. Names URL and model.
    """


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation to answer, and how. ``json_schema`` asks for structured output.

    ``extra`` holds further fields of OpenAI's: they are passed on, ``tools`` among them.
    """

    messages: Sequence[Message]
    max_tokens: int
    temperature: float = 0.0
    seed: int | None = None
    json_schema: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Completion:
    """One whole answer. ``finish_reason`` as OpenAI's: ``length`` means it was cut off."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    raw: Mapping[str, Any] = field(default_factory=dict)  # the backend's whole reply, if it has one

    @classmethod
    def of(cls, reply: Mapping[str, Any]) -> Completion:
        """What ``/v1/chat/completions`` replied; an odd reply raises one of `ODD`."""
        choice = reply["choices"][0]
        usage = reply.get("usage") or {}
        return cls(
            text="".join(texts_of(choice["message"].get("content"))),
            finish_reason=str(choice.get("finish_reason") or "stop"),
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            completion_tokens=int(usage.get("completion_tokens") or 0),
            raw=reply,
        )


class LogLikelihood(NamedTuple):
    """Sum of a continuation's token log-likelihoods (nats) and how many tokens it has."""

    sum: float
    tokens: int

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.sum / self.tokens


class LLM(Protocol):
    """An instruct model behind a chat template. Every method may be called concurrently."""

    model: str  # what identifies the weights: part of cache keys and provenance

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together; a server's own limit is known after `ready`."""
        ...

    async def ready(self) -> None:
        """Check once that the model is there; raises `LLMUnavailable` or `LLMError`."""
        ...

    async def chat(self, chat: Chat) -> Completion:
        """The whole answer."""
        ...

    def stream(self, chat: Chat) -> AsyncIterator[Mapping[str, Any]]:
        """Yield OpenAI ``chat.completion.chunk`` objects (as dicts) until the answer ends."""
        ...

    async def loglikelihood(self, context: Sequence[Message], continuation: str) -> LogLikelihood:
        """Log-likelihood of ``continuation`` as the assistant's reply to ``context``."""
        ...

    async def label_probabilities(
        self, context: Sequence[Message], labels: Sequence[str]
    ) -> list[float]:
        """Probability of each label as the reply's first token, renormalised over ``labels``."""
        ...

    def count_tokens(
        self, messages: Sequence[Message], extra: Mapping[str, Any] | None = None
    ) -> int:
        """Tokens of the rendered prompt, generation header included.

        ``extra`` is as in `Chat`: its ``tools`` are in the prompt.
        """
        ...

    async def aclose(self) -> None:
        """Release connections, threads and weights."""
        ...
