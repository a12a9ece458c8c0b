"""What the sync and the async client share: settings, retries, reading replies."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import httpx

from memshare.client import calls
from memshare.client.calls import Call
from memshare.client.errors import (
    ConnectionFailed,
    GatewayError,
    InvalidRequest,
    Overloaded,
    Unavailable,
    error_of,
)
from memshare.client.replies import ChatChunk

H = TypeVar("H")
T = TypeVar("T")
DEFAULT_URL = "http://127.0.0.1:8000"
_LONGEST_WAIT = 30.0
_DONE = "data: [DONE]"
FAILURES = (httpx.HTTPError, httpx.InvalidURL, UnicodeError)  # of sending a request
_NOT_MADE = (httpx.ConnectError, httpx.ConnectTimeout)
# How what isn't in a reply, or is of another form there, shows when it is read.
_ODD = (ValueError, LookupError, TypeError, AttributeError, StopIteration)
_FIELDS = (":", "data:", "event:", "id:", "retry:")  # of a stream of events, and comments


class Connected(Generic[H]):
    """Where the gateway is, by what key, and how patient to be; ``H`` is httpx's client."""

    _connect: Callable[..., H]

    def __init__(
        self,
        url: str | None = None,
        key: str | None = None,
        *,
        timeout_seconds: float = 120.0,
        retries: int = 2,
    ) -> None:
        """``url`` and ``key`` default to MEMSHARE_URL and MEMSHARE_KEY in the environment.

        What the gateway refuses for the moment (429, 503), and a connection that can't be made, is
        tried again ``retries`` times. Nothing was done then, but for a write that was stored and is
        not searchable yet (503), whose items come back as duplicates; so nothing is done twice.

        Raises ValueError for an ``url`` or a ``key`` that can't be one.
        """
        key = (key or os.environ.get("MEMSHARE_KEY") or "").strip()  # files end with a newline
        if not (key.isascii() and key.isprintable()):
            raise ValueError("the key (MEMSHARE_KEY) has characters that no key has")
        self._retries = retries
        self._http = self._connect(
            base_url=_checked(url or os.environ.get("MEMSHARE_URL") or DEFAULT_URL),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=timeout_seconds,
        )

    def _pause(self, error: GatewayError, attempt: int) -> float:
        """Seconds until the next attempt; raises ``error`` if there is none."""
        passing = isinstance(error, Overloaded | Unavailable) or (
            isinstance(error, ConnectionFailed) and isinstance(error.__cause__, _NOT_MADE)
        )
        wait = 0.5 * 2**attempt if error.retry_after is None else error.retry_after
        if not passing or attempt >= self._retries or wait > _LONGEST_WAIT:
            raise error
        return wait


def _checked(url: str) -> str:
    """``url`` without slashes at its end; raises ValueError if it can't be a gateway's."""
    try:
        parts = httpx.URL(url)
        usable = parts.scheme in ("http", "https") and parts.host and (parts.port or 0) < 65536
    except (httpx.InvalidURL, UnicodeError):
        usable = False
    if not usable:
        raise ValueError(f"{url!r} is no URL of a gateway (MEMSHARE_URL): http://HOST:PORT")
    return url.rstrip("/")


def broken(error: Exception) -> GatewayError:
    """What one of `FAILURES` stands for: no reply came, or not all of it, or nothing was sent."""
    failure: GatewayError
    if isinstance(error, httpx.HTTPError):
        made = not isinstance(error, _NOT_MADE)  # then it may have done what was asked
        what = "the gateway gave no whole answer" if made else "the gateway can't be reached"
        failure = ConnectionFailed(f"{what}: {type(error).__name__}: {error}")
    else:  # half a surrogate pair, an id of megabytes
        failure = InvalidRequest(f"the request can't be sent: {error}")
    failure.__cause__ = error
    return failure


def read(call: Call[T], reply: httpx.Response) -> T | GatewayError:
    """The result, or the refusal, which the caller may retry."""
    if not reply.is_success:
        return refusal_of(reply)
    try:
        return call.read(reply.json())
    except _ODD as error:
        return _strange(f"{reply.url} answers {reply.text[:200]!r}", reply.status_code, error)


def refusal_of(reply: httpx.Response) -> GatewayError:
    """What a reply that is no success stands for; its body must have been read."""
    if reply.status_code < 400:  # a page to log in at, most likely: no gateway sends one on
        to = reply.headers.get("location", "another page")
        return _strange(f"{reply.url} sends on to {to}", reply.status_code)
    return error_of(reply.status_code, reply.content, reply.headers)


def _chunk_of(line: str) -> ChatChunk | None:
    """The chunk on a line of a stream, None if it has none. Raises `GatewayError` for an error."""
    said = f"the stream has {line[:200]!r}"
    if not line.startswith("data: "):
        if line and not line.startswith(_FIELDS):
            raise _strange(said)
        return None
    try:
        event = json.loads(line.removeprefix("data: "))
        if "error" not in event:
            return calls.chunk(event)
        failure = GatewayError(str(event["error"]["message"]), detail=event["error"])
    except _ODD as error:
        raise _strange(said) from error
    raise failure


class Events:
    """The chunks of a stream, read as its bytes come in. ``done``: the stream has ended whole.

    httpx would end lines at U+2028 and its like, too, which JSON may hold as they are.
    """

    def __init__(self) -> None:
        self.done = False
        self._begun = b""

    def read(self, data: bytes) -> Iterator[ChatChunk]:
        """The chunks that ``data`` completes. Raises `GatewayError` for an error."""
        *lines, self._begun = (self._begun + data).split(b"\n")
        for line in lines:
            text = line.decode(errors="replace").rstrip("\r")
            self.done = self.done or text == _DONE
            if not self.done and (chunk := _chunk_of(text)):
                yield chunk

    def end(self) -> Iterator[ChatChunk]:
        """What stands on a last line that has no end; then raises unless the stream is whole."""
        yield from self.read(b"\n")
        if not self.done:
            raise ConnectionFailed("the stream ended before it was complete")


def _strange(what: str, status: int | None = None, cause: Exception | None = None) -> GatewayError:
    failure = GatewayError(f"{what}; is this a memshare gateway?", status)
    failure.__cause__ = cause
    return failure
