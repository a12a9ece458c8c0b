"""HTTP to an LLM server or its replicas: bounded concurrency, retries, errors that say where.

Retried: no connection, timeouts, 408, 429 and 5xx, on another replica where there is one, else with
backoff; ``Retry-After`` is obeyed. Refused at once: any other 4xx, with the server's own message.
A replica that can't be reached is left out for a while (`memshare.llm.replicas`).
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import time
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

import httpx
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential_jitter,
)

from memshare.llm.base import LLMError, LLMUnavailable
from memshare.llm.lanes import Lanes
from memshare.llm.replicas import Replicas

T = TypeVar("T")
MAX_WAIT_SECONDS = 60.0  # of a Retry-After that asks for more
_GONE = (502, 503, 504)  # what stands before a server says so of one that is away


class _Passing(Exception):
    """A failure that may pass by itself; ``wait`` is what the server asked for, in seconds."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class Transport:
    """A JSON client for one server, or equal ones; safe to use from several event loops.

    ``name`` (the model) goes into every error beside the URL. ``retries`` counts attempts after
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
        each = [_checked(url, name) for url in ([urls] if isinstance(urls, str) else urls)]
        self.replicas = Replicas(each)
        self.url = ", ".join(each)
        self.name = name
        self._timeout = timeout
        self._retries = retries
        self._concurrency = concurrency
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._backoff = wait_exponential_jitter(initial=backoff, max=20.0, jitter=backoff)
        # Connections and semaphores belong to the loop that made them.
        self._loops: weakref.WeakKeyDictionary[
            asyncio.AbstractEventLoop, tuple[httpx.AsyncClient, asyncio.Semaphore]
        ] = weakref.WeakKeyDictionary()

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

            async def opened(url: str) -> tuple[str, AsyncIterator[str]]:
                async with AsyncExitStack() as attempt:
                    asked = self._request("POST", url, path, body)
                    data = _data((await attempt.enter_async_context(asked)).aiter_lines())
                    try:
                        first = await anext(data, "")
                    except httpx.HTTPError as error:
                        raise self._lost(url, error) from error
                    stack.push_async_exit(attempt.pop_all())
                    return first, data

            first, rest = await self._retried(opened, bounded=False)
            try:
                if first and first != "[DONE]":
                    yield self._event(first)
                async for data in rest:
                    if data == "[DONE]":
                        return
                    yield self._event(data)
                if first == "[DONE]":
                    return
            except httpx.HTTPError as error:
                raise self._unavailable(f"the stream broke: {_reason(error)}") from error
        raise self._unavailable("the stream ended before it was complete")

    async def aclose(self) -> None:
        """Close this loop's connections."""
        mine = self._loops.pop(asyncio.get_running_loop(), None)
        if mine is not None:
            await mine[0].aclose()

    def _mine(self) -> tuple[httpx.AsyncClient, asyncio.Semaphore]:
        loop = asyncio.get_running_loop()
        if loop not in self._loops:
            client = httpx.AsyncClient(
                headers=self._headers,
                timeout=httpx.Timeout(self._timeout, connect=min(10.0, self._timeout), pool=None),
                transport=Lanes(),
            )
            self._loops[loop] = (client, asyncio.Semaphore(self._concurrency))
        return self._loops[loop]

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

    def _lost(self, url: str, error: httpx.HTTPError) -> _Passing:
        self.replicas.failed(url)
        return _Passing(_reason(error))

    async def _whole(
        self, method: str, url: str, path: str, body: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        async with self._request(method, url, path, body) as response:
            try:
                text = await response.aread()
            except httpx.HTTPError as error:
                raise self._lost(url, error) from error
        try:
            value = json.loads(text)
        except ValueError as error:
            raise LLMError(f"{url}{path} ({self.name}) sent no JSON: {text[:200]!r}") from error
        if not isinstance(value, dict):
            raise LLMError(f"{url}{path} ({self.name}) sent no JSON object: {text[:200]!r}")
        return value

    @asynccontextmanager
    async def _request(
        self, method: str, url: str, path: str, body: Mapping[str, Any] | None
    ) -> AsyncIterator[httpx.Response]:
        """An accepted response, its body unread; anything else raises."""
        client, _ = self._mine()
        try:
            request = client.build_request(method, url + path, json=body)
            response = await client.send(request, stream=True)
        except httpx.HTTPError as error:
            raise self._lost(url, error) from error
        except ValueError as error:  # a body that JSON can't hold: NaN, a lone surrogate
            raise LLMError(f"the request can't be sent: {error}") from error
        try:
            if response.status_code in _GONE:
                self.replicas.failed(url)
            else:
                self.replicas.worked(url)
            if response.is_success:
                yield response
            else:
                try:
                    text = (await response.aread()).decode(errors="replace")
                except httpx.HTTPError as error:
                    raise self._lost(url, error) from error
                self._refuse(response, url + path, text)
        finally:
            await response.aclose()

    def _refuse(self, response: httpx.Response, where: str, text: str) -> None:
        reason = f"status {response.status_code}: {_message(text)}"
        if response.status_code in (408, 429) or response.status_code >= 500:
            raise _Passing(reason, _retry_after(response.headers.get("retry-after")))
        raise LLMError(f"{where} refused the request (model {self.name}): {reason}")

    def _event(self, data: str) -> dict[str, Any]:
        try:
            value: dict[str, Any] = json.loads(data)
        except ValueError as error:
            raise LLMError(f"{self.url} ({self.name}) streamed no JSON: {data[:200]}") from error
        if "error" in value:  # vLLM reports a failure inside a stream as an event
            raise LLMError(f"{self.url} (model {self.name}): {_message(data)}")
        return value

    def _unavailable(self, reason: str) -> LLMUnavailable:
        return LLMUnavailable(
            f"LLM unavailable at {self.url} (model {self.name}): {reason}; "
            "start it (python serve/llm.py) or correct the url in the configuration"
        )


def _checked(url: str, name: str) -> str:
    """``url`` without ``/v1`` at its end; raises `LLMError` if it can't be a server's."""
    bare = url.rstrip("/").removesuffix("/v1")
    try:
        usable = httpx.URL(bare).scheme in ("http", "https") and httpx.URL(bare).host
    except httpx.InvalidURL:
        usable = False
    if not usable:
        raise LLMError(f"{url!r} is no URL of an LLM server (model {name}): http://host:port")
    return bare


async def _data(lines: AsyncIterator[str]) -> AsyncIterator[str]:
    """What server-sent events carry."""
    async for line in lines:
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data:
            yield data


def _reason(error: Exception) -> str:
    kind = "no answer in time" if isinstance(error, httpx.TimeoutException) else "no connection"
    return f"{kind} ({type(error).__name__}{': ' + str(error) if str(error) else ''})"


def _message(text: str) -> str:
    """The message inside an OpenAI-style error, or the beginning of whatever came."""
    try:
        value = json.loads(text)
        error = value.get("error", value.get("detail", value))
        return str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        return text[:500].strip()


def _retry_after(header: str | None) -> float | None:
    """Seconds of a Retry-After header, given as a number or a date; None if there is none."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        moment = email.utils.parsedate_to_datetime(header)
    except ValueError:
        return None
    return max(0.0, moment.timestamp() - time.time())
