"""The vLLM backend: an OpenAI-compatible server over HTTP."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from memshare.config import LLMConfig
from memshare.llm.base import (
    ODD,
    Chat,
    Completion,
    ContextTooLong,
    LLMError,
    LLMUnavailable,
    LogLikelihood,
    Message,
)
from memshare.llm.factory import model_identity
from memshare.llm.grouping import Grouped
from memshare.llm.tokens import ChatTokenizer, Span
from memshare.llm.transport import Transport

_FLIGHTS = 2  # groups of likelihoods under way: one is computed while the other travels
_GROUP_TOKENS = 16_384  # of prompts in one request: its reply takes about 90 bytes a token


class VLLMBackend:
    """An LLM behind a vLLM server. Follows `memshare.llm.base.LLM`.

    Chat goes through ``/v1/chat/completions``, where the server applies the chat template to
    messages whose text was neutralised here. Likelihoods go as token ids to ``/v1/completions``
    with ``prompt_logprobs``, so that the span of the answer is known exactly: the tokenizer is
    loaded here from the same model (folder or hub name). Those that wait together share a request;
    ``max_concurrency`` bounds prompts, not requests, then.

    Nothing is sent before the first call. `ready` learns from ``/v1/models`` the name under which
    the model is served and its context length; every method does it first: once, and again after a
    request failed, for the server may have been started again with others.
    """

    def __init__(self, model: str, config: LLMConfig, backoff_seconds: float = 0.5) -> None:
        self.config = config
        self.model = model_identity(model)
        self._source = model
        self._chat_tokenizer: ChatTokenizer | None = None
        self._served: str | None = None
        self._known = False  # as of the last request: what is served, and how much fits
        self._context_length: int | None = None
        self._http = Transport(
            config.urls,
            model,
            timeout=config.timeout_seconds,
            retries=config.retries,
            concurrency=config.max_concurrency,
            api_key=os.environ.get(config.api_key_env),
            backoff=backoff_seconds,
        )
        self._likelihoods = Grouped(
            self._measure,
            flights=min(_FLIGHTS, config.max_concurrency),
            most=max(1, config.max_concurrency // _FLIGHTS),
            size=lambda span: len(span.ids),
            capacity=_GROUP_TOKENS,
        )

    @property
    def chat_tokenizer(self) -> ChatTokenizer:
        """The model's tokenizer, loaded when it is first needed."""
        if self._chat_tokenizer is None:
            self._chat_tokenizer = ChatTokenizer(self._source)
        return self._chat_tokenizer

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together: the server's limit, once `ready` has asked."""
        if self._context_length is None:
            raise LLMError("the context length is the server's: await ready() first")
        return self._context_length

    async def ready(self) -> None:
        """Ask the server what it serves, unless it was asked and no request has failed since.

        Raises `LLMUnavailable` naming URL and model, also if another model is served.
        """
        if self._known:
            return
        if self._chat_tokenizer is None:
            await asyncio.to_thread(lambda: self.chat_tokenizer)
        reply = await self._http.get("/v1/models")
        try:
            served, limit = self._card(reply)
        except (*ODD, OSError) as error:  # OSError: a root that is longer than paths are
            raise LLMUnavailable(
                f"{self._http.url}/v1/models: unexpected reply {str(reply)[:300]}"
            ) from error
        self._served, self._context_length, self._known = served, limit, True

    def _card(self, reply: Mapping[str, Any]) -> tuple[str, int]:
        """Name and context length of our model in the list of those that are served."""
        cards = [card for card in reply.get("data", []) if isinstance(card, dict)]
        folder = Path(self._source).is_dir() and Path(self._source).resolve()
        for card in cards:
            root = str(card.get("root") or "")
            same_folder = bool(folder) and Path(root).is_dir() and Path(root).resolve() == folder
            if card.get("id") == self._source or root == self._source or same_folder:
                break
        else:
            served = ", ".join(str(card.get("id")) for card in cards) or "nothing"
            raise LLMUnavailable(f"{self._http.url} serves {served}, not {self._source}")
        limit = card.get("max_model_len")
        known = self.chat_tokenizer.tokenizer.model_max_length
        return str(card["id"]), int(limit or (known if known < 10**9 else 2048))

    def count_tokens(
        self, messages: Sequence[Message], extra: Mapping[str, Any] | None = None
    ) -> int:
        """Tokens of the rendered prompt, generation header included."""
        return self.chat_tokenizer.count(messages, extra)

    async def chat(self, chat: Chat) -> Completion:
        """The whole answer."""
        await self.ready()
        reply = await self._post("/v1/chat/completions", self._body(chat))
        try:
            return Completion.of(reply)
        except ODD as error:
            raise self._unexpected(reply) from error

    async def stream(self, chat: Chat) -> AsyncGenerator[Mapping[str, Any]]:
        """Yield the server's ``chat.completion.chunk`` objects as they come."""
        await self.ready()
        body = self._body(chat) | {"stream": True}
        # Closed at once if the reader goes away, so that the server stops generating.
        async with aclosing(self._http.events("/v1/chat/completions", body)) as events:
            try:
                async for event in events:
                    yield event
            except LLMError:
                self._known = False
                raise

    async def loglikelihood(self, context: Sequence[Message], continuation: str) -> LogLikelihood:
        """Log-likelihood of ``continuation`` (without end-of-turn) as the reply to ``context``."""
        await self.ready()
        span = self.chat_tokenizer.span(context, continuation, self.context_length)
        return await self._likelihoods(span)

    async def label_probabilities(
        self, context: Sequence[Message], labels: Sequence[str]
    ) -> list[float]:
        """Probability of each label as the reply's first token, renormalised over ``labels``.

        One request reads every label (``logprob_token_ids``); ``/generative_scoring`` would need
        one for each.
        """
        await self.ready()
        prefix, ids = self.chat_tokenizer.label_ids(labels)
        prompt = self.chat_tokenizer.prompt_ids(context) + prefix
        if len(prompt) + 1 > self.context_length:
            raise ContextTooLong(self.model, len(prompt) + 1, self.context_length)
        reply = await self._post(
            "/v1/completions",
            {
                "model": self._served,
                "prompt": prompt,
                "max_tokens": 1,
                "temperature": 0.0,
                "logprobs": 1,  # must be set; which ones is said below
                "logprob_token_ids": ids,
                "return_tokens_as_token_ids": True,
            },
        )
        try:
            read = reply["choices"][0]["logprobs"]["top_logprobs"][0]
            scores = [float(read[f"token_id:{token}"]) for token in ids]
            highest = max(scores)
            # Never a number made of those: a label may be impossible, but not all of them.
            if any(map(math.isnan, scores)) or math.isinf(highest):
                raise ValueError("not finite")
        except ODD as error:
            raise self._unexpected(reply) from error
        weights = [math.exp(score - highest) for score in scores]
        return [weight / math.fsum(weights) for weight in weights]

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return await self._http.post(path, body)
        except LLMError:
            self._known = False
            raise

    async def _measure(self, spans: Sequence[Span]) -> list[LogLikelihood | LLMError]:
        """The likelihood of each span's continuation, by one request for all of them.

        A server refuses a request for one text in it. Those that came along are asked for again, by
        halves, so that an error is of the text that it is about.
        """
        try:
            return [*await self._measure_together(spans)]
        except LLMUnavailable:
            raise
        except LLMError as error:
            if len(spans) == 1:
                return [error]
        half = len(spans) // 2
        return [*await self._measure(spans[:half]), *await self._measure(spans[half:])]

    async def _measure_together(self, spans: Sequence[Span]) -> list[LogLikelihood]:
        reply = await self._post(
            "/v1/completions",
            {
                "model": self._served,
                "prompt": [span.ids for span in spans],
                "max_tokens": 1,  # the least vLLM takes; the token itself is not used
                "temperature": 0.0,
                "prompt_logprobs": 0,  # the prompt's own tokens only
            },
        )
        try:
            rows = {choice["index"]: choice["prompt_logprobs"] for choice in reply["choices"]}
            return [self._read(rows[i], span) for i, span in enumerate(spans)]
        except ODD as error:
            raise self._unexpected(reply) from error

    @staticmethod
    def _read(rows: Sequence[Mapping[str, Any]], span: Span) -> LogLikelihood:
        """Sum over the continuation, from each prompt position's ``{token id: {"logprob"}}``."""
        if len(rows) != len(span.ids):
            raise ValueError(f"{len(rows)} rows for {len(span.ids)} tokens")
        tail = range(span.start, len(span.ids))
        scores = [float(rows[i][str(span.ids[i])]["logprob"]) for i in tail]
        return LogLikelihood(math.fsum(scores), len(scores))

    def _body(self, chat: Chat) -> dict[str, Any]:
        body: dict[str, Any] = dict(chat.extra)
        body["model"] = self._served
        body["messages"] = self.chat_tokenizer.clean(chat.messages)
        body["max_tokens"] = chat.max_tokens
        body["temperature"] = chat.temperature
        if chat.seed is not None:
            body["seed"] = chat.seed
        if chat.json_schema is not None:
            body["structured_outputs"] = {"json": dict(chat.json_schema)}
        return body

    def _unexpected(self, reply: Mapping[str, Any]) -> LLMError:
        return LLMError(
            f"{self._http.url} (model {self._source}): unexpected reply {str(reply)[:300]}; "
            "vLLM 0.20 or newer is needed"
        )
