"""Any OpenAI-compatible endpoint: an agent whose tokenizer and weights are somebody else's.

It chats, streams and judges by labels. It can't say how likely a given text is, which chat
completions do not offer, so a scorer LLM that labels by likelihood is vLLM's or in process.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any
from urllib.parse import urlsplit

from memshare.config import LLMConfig
from memshare.llm.base import (
    ODD,
    Chat,
    Completion,
    ContextTooLong,
    LLMError,
    LogLikelihood,
    Message,
    texts_of,
)
from memshare.llm.neutralise import break_known, in_texts
from memshare.llm.transport import Transport

_BYTES_PER_TOKEN = 3  # on the safe side: English has about four, and most scripts more tokens
_TURN_TOKENS = 8  # what a template puts around a message
_TOP_LOGPROBS = 20  # as many as the protocol gives


class EndpointBackend:
    """An LLM behind ``/v1/chat/completions``. Follows `memshare.llm.base.LLM`.

    ``model`` is the endpoint's own name for it. Tokens are estimated from bytes; what the endpoint
    then finds too long, it refuses (`LLMError`). Control strings of the common chat formats are
    broken in every text that goes out; those that no one but its own tokenizer knows are not.
    """

    def __init__(self, model: str, config: LLMConfig) -> None:
        self.config = config
        self._name = model
        self._http = Transport(
            config.urls,
            model,
            timeout=config.timeout_seconds,
            retries=config.retries,
            concurrency=config.max_concurrency,
            api_key=os.environ.get(config.api_key_env),
        )
        _, _, host = urlsplit(config.urls[0]).netloc.rpartition("@")  # no user, no password
        self.model = f"{model}@{host}"

    @property
    def context_length(self) -> int:
        """As configured: an endpoint can't be asked."""
        return self.config.context_length

    async def ready(self) -> None:
        """Nothing is asked before the first call: not every endpoint lists its models."""

    def count_tokens(
        self, messages: Sequence[Message], extra: Mapping[str, Any] | None = None
    ) -> int:
        """An upper estimate of the tokens of the rendered prompt, but for images and the like."""
        sizes = [_bytes(message) for message in messages]
        if tools := (extra or {}).get("tools"):
            sizes.append(len(json.dumps(tools)))
        return sum(math.ceil(size / _BYTES_PER_TOKEN) + _TURN_TOKENS for size in sizes)

    async def chat(self, chat: Chat) -> Completion:
        """The whole answer."""
        reply = await self._http.post("/v1/chat/completions", self._body(chat))
        try:
            return Completion.of(reply)
        except ODD as error:
            raise LLMError(f"{self.model}: unexpected reply {reply!s:.300}") from error

    async def stream(self, chat: Chat) -> AsyncGenerator[Mapping[str, Any]]:
        """Yield the endpoint's ``chat.completion.chunk`` objects as they come."""
        body = self._body(chat) | {"stream": True}
        async with aclosing(self._http.events("/v1/chat/completions", body)) as events:
            async for event in events:
                yield event

    async def loglikelihood(self, context: Sequence[Message], continuation: str) -> LogLikelihood:
        """Raises `LLMError`: this protocol does not tell."""
        raise LLMError(
            f"{self.model}: chat completions give no likelihood of a given text; set scorer_llm to "
            "a vLLM server or a model in this process, or mining.labels to reward or prompted"
        )

    async def label_probabilities(
        self, context: Sequence[Message], labels: Sequence[str]
    ) -> list[float]:
        """Probability of each label as the reply's first token, renormalised over ``labels``.

        A label that is not among the likeliest tokens has none; raises `LLMError` if all are so.
        """
        tokens = self.count_tokens(context) + 1
        if tokens > self.context_length:
            raise ContextTooLong(self.model, tokens, self.context_length)
        extra = {"logprobs": True, "top_logprobs": _TOP_LOGPROBS}
        reply = (await self.chat(Chat(context, 1, extra=extra))).raw
        try:
            top = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            found = [(str(item["token"]).strip(), math.exp(item["logprob"])) for item in top]
            if not all(math.isfinite(probability) for _, probability in found):
                raise ValueError("not finite")
        except ODD as error:
            raise LLMError(f"{self.model} gives no log probabilities: {reply!s:.300}") from error
        weights = [math.fsum(p for token, p in found if token == label) for label in labels]
        total = math.fsum(weights)
        if total == 0.0:
            raise LLMError(f"{self.model}: none of {list(labels)} is among its likeliest tokens")
        return [weight / total for weight in weights]

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    def _body(self, chat: Chat) -> dict[str, Any]:
        body: dict[str, Any] = {
            **chat.extra, "model": self._name,
            "messages": [_neutral(one) for one in chat.messages],
            "max_tokens": chat.max_tokens, "temperature": chat.temperature,
        }  # fmt: skip
        if chat.seed is not None:
            body["seed"] = chat.seed
        if chat.json_schema is not None:
            schema = {"name": "reply", "schema": dict(chat.json_schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body


def _neutral(message: Mapping[str, Any]) -> dict[str, Any]:
    neutral = dict(message)
    if "content" in neutral:
        neutral["content"] = in_texts(neutral["content"], break_known)
    return neutral


def _bytes(message: Mapping[str, Any]) -> int:
    """Of a message's text and of the tools that it calls."""
    calls = json.dumps(message["tool_calls"]) if message.get("tool_calls") else ""
    said = "".join(texts_of(message.get("content"))) + calls
    return len(said.encode(errors="replace"))
