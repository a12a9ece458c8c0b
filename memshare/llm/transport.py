"""HTTP to an LLM server or its replicas: bounded concurrency, retries, errors that say where.

Retried: no connection, timeouts, 408, 429 and 5xx, on another replica where there is one, else with
backoff; ``Retry-After`` is obeyed. Refused at once, with the server's own message: any other 4xx.
Those that are about key, url or model and not about the text, and redirects, count as a server that
is away. Routers tell of a failure behind them with status 200 and an ``error`` whose ``code`` is a
status: that one counts.
A replica that can't be reached is left out for a while (`memshare.llm.replicas`).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NoReturn, TypeVar

import aiohttp
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential_jitter,
)

from memshare.config import without_secrets
from memshare.llm.base import LLMError, LLMUnavailable
from memshare.llm.http import (
    LOST,
    error_message,
    event_data,
    json_object,
    open_session,
    proxy_of,
    reason_of,
    retry_after,
    server_url,
)
from memshare.llm.replicas import Replicas

T = TypeVar("T")
MAX_WAIT_SECONDS = 60.0  # of a Retry-After that asks for more
# Of a wrong or unpaid key, a wrong url, or a model that isn't there (any more), whatever the text.
_LOCKED_OUT = (401, 402, 404, 405, 407, 410)
_FORBIDDEN = (
    403  # about rights, like those, until something was allowed; some content filters' word
)
_GONE = (502, 503, 504)  # what stands before a server says so of one that is away


class _Passing(Exception):
    """A failure that may pass by itself; ``wait`` is what the server asked for, in seconds."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class Transport:
    """A JSON client for one server, or equal ones; safe to use from several event loops.

    ``name`` (the model) goes into every error beside the URL. ``timeout``: seconds until a whole
    answer is there, and without a byte of one that is streamed. ``retries`` counts attempts after
    the first on each server; the pause before the n-th is about ``backoff * 2**n`` seconds with
    jitter, and none where another server has not been tried yet.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        name: str,
        *,
        timeout: float,
        retries: int,
        concurrency: int,
        api_key: str | None = None,
        backoff: float = 0.5,
    ) -> None:
        each = [server_url(url, name) for url in ([urls] if isinstance(urls, str) else urls)]
        self.replicas = Replicas(each)
        self.url = without_secrets(", ".join(each))  # for people: it goes into messages
        self.name = name
        self._timeout = timeout
        self._retries = retries
        self._concurrency = concurrency
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._backoff = wait_exponential_jitter(initial=backoff, max=20.0, jitter=backoff)
        self._proxies = {url: proxy_of(url) for url in each}
        self._allowed = False
        # Connections and semaphores belong to the loop that made them.
        self._loops: dict[
            asyncio.AbstractEventLoop, tuple[aiohttp.ClientSession, asyncio.Semaphore]
        ] = {}

    async def get(self, path: str) -> dict[str, Any]:
        """GET ``path`` and return its JSON object."""
        return await self._retried(lambda url: self._whole("GET", url, path, None))

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """POST ``body`` and return the answer's JSON object."""
        return await self._retried(lambda url: self._whole("POST", url, path, body))

    async def events(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """POST ``body`` and yield each server-sent event's JSON until ``[DONE]``.

        Retried only until the first event has come: what was yielded can't be taken back. A stream
        that breaks later raises `LLMUnavailable`.
        """
        _, semaphore = self._mine()
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(semaphore)

            async def opened(url: str) -> tuple[dict[str, Any] | None, bool, AsyncIterator[str]]:
                async with AsyncExitStack() as attempt:
                    asked = self._request("POST", url, path, body)
                    data = event_data(await attempt.enter_async_context(asked))
                    try:
                        first = await anext(data, "")
                    except LOST as error:
                        raise self._lost(url, error) from error
                    event = None if first in ("", "[DONE]") else self._event(first)
                    stack.push_async_exit(attempt.pop_all())
                    return event, first == "[DONE]", data

            event, done, rest = await self._retried(opened, bounded=False)
            try:
                if event is not None:
                    yield event
                async for data in rest:
                    if data == "[DONE]":
                        return
                    yield self._event(data)
                if done:
                    return
            except LOST as error:
                raise self._unavailable(f"the stream broke: {reason_of(error)}") from error
            except _Passing as error:
                raise self._unavailable(f"the stream broke: {error}") from error
        raise self._unavailable("the stream ended before it was complete")

    async def aclose(self) -> None:
        """Close this loop's connections."""
        mine = self._loops.pop(asyncio.get_running_loop(), None)
        if mine is not None:
            await mine[0].close()

    def _mine(self) -> tuple[aiohttp.ClientSession, asyncio.Semaphore]:
        loop = asyncio.get_running_loop()
        mine = self._loops.get(loop)
        if mine is None:
            for old in list(self._loops):  # other threads may add theirs meanwhile
                if old.is_closed():
                    self._loops.pop(old, None)
            session = open_session(self.replicas.urls, self._timeout, self._headers)
            mine = self._loops[loop] = (session, asyncio.Semaphore(self._concurrency))
        return mine

    async def _retried(self, attempt: Callable[[str], Awaitable[T]], bounded: bool = True) -> T:
        """Run ``attempt(url)`` until it succeeds, is refused, or the retries are used up."""
        _, semaphore = self._mine()
        most = (self._retries + 1) * len(self.replicas.urls)
        tried: list[str] = []
        try:
            async for trial in AsyncRetrying(
                retry=retry_if_exception_type(_Passing),
                stop=stop_after_attempt(most),
                wait=lambda state: self._pause(state, tried),
                reraise=True,
            ):
                with trial:
                    if not bounded:
                        return await self._once(attempt, tried)
                    # Given back while waiting, so that one slow recovery does not block the rest.
                    async with semaphore:
                        return await self._once(attempt, tried)
        except _Passing as error:
            raise self._unavailable(f"{error}, after {len(tried)} attempt(s)") from error
        raise AssertionError("unreachable: tenacity ends by a result or an exception")

    async def _once(self, attempt: Callable[[str], Awaitable[T]], tried: list[str]) -> T:
        url = self.replicas.pick(tried)
        tried.append(url)
        return await attempt(url)

    def _pause(self, state: RetryCallState, tried: Sequence[str]) -> float:
        """Seconds before the next attempt: none before a server that was not tried yet."""
        if any(url not in tried for url in self.replicas.urls):
            return 0.0
        error = state.outcome.exception() if state.outcome else None
        asked = error.wait if isinstance(error, _Passing) else None
        return self._backoff(state) if asked is None else min(asked, MAX_WAIT_SECONDS)

    def _lost(self, url: str, error: Exception) -> _Passing:
        self.replicas.failed(url)
        return _Passing(reason_of(error))

    async def _whole(
        self, method: str, url: str, path: str, body: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        try:
            # In all: the session's own timeout begins anew with every byte.
            async with (
                asyncio.timeout(self._timeout),
                self._request(method, url, path, body) as response,
            ):
                text = await response.read()
        except LOST as error:
            raise self._lost(url, error) from error
        value = json_object(text)
        if value is None:
            raise LLMUnavailable(
                f"{without_secrets(url + path)} (model {self.name}) sent no JSON object: "
                f"{text[:200]!r}; correct the url in the configuration"
            )
        self._check(value, url + path)
        return value

    @asynccontextmanager
    async def _request(
        self, method: str, url: str, path: str, body: Mapping[str, Any] | None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """An accepted response, its body unread; anything else raises."""
        session, _ = self._mine()
        data, headers = None, {}
        if body is not None:
            try:
                data = json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
            except ValueError as error:  # what JSON can't hold: NaN, a lone surrogate
                raise LLMError(f"the request can't be sent: {error}") from error
            headers = {"Content-Type": "application/json"}
        try:
            response = await session.request(
                method, url + path, data=data, headers=headers, proxy=self._proxies[url],
                allow_redirects=False,
            )  # fmt: skip
        except LOST as error:
            raise self._lost(url, error) from error
        async with response:
            if response.status in _GONE:
                self.replicas.failed(url)
            else:
                self.replicas.worked(url)
            if not 200 <= response.status < 300:
                try:
                    text = (await response.read()).decode(errors="replace")
                except LOST as error:
                    raise self._lost(url, error) from error
                wait = retry_after(response.headers.get("retry-after"))
                self._refuse(response.status, url + path, error_message(text), wait)
            self._allowed = self._allowed or method == "POST"
            yield response

    def _refuse(self, status: int, where: str, message: str, wait: float | None = None) -> NoReturn:
        reason = f"status {status}: {message}"
        if status in (408, 429) or status >= 500:
            raise _Passing(reason, wait)
        refusal = f"{without_secrets(where)} refused the request (model {self.name}): {reason}"
        locked = status < 400 or status in _LOCKED_OUT
        if locked or (status == _FORBIDDEN and not self._allowed):
            raise LLMUnavailable(f"{refusal}; correct key, url or model in the configuration")
        raise LLMError(refusal)

    def _check(self, value: Mapping[str, Any], where: str) -> None:
        """Raise if an accepted reply is an error all the same."""
        error = value.get("error")
        if error is None:  # some servers say that there is none
            return
        code = error.get("code") if isinstance(error, dict) else None
        message = error_message(json.dumps(value))
        if isinstance(code, int) and 400 <= code < 600:
            self._refuse(code, where, message)
        raise LLMError(f"{without_secrets(where)} (model {self.name}): {message}")

    def _event(self, data: str) -> dict[str, Any]:
        value = json_object(data)
        if value is None:
            raise LLMError(f"{self.url} ({self.name}) streamed no JSON object: {data[:200]}")
        self._check(value, self.url)  # vLLM reports a failure inside a stream as an event, too
        return value

    def _unavailable(self, reason: str) -> LLMUnavailable:
        return LLMUnavailable(
            f"LLM unavailable at {self.url} (model {self.name}): {reason}; "
            "start it (python serve/llm.py) or correct the url in the configuration"
        )
