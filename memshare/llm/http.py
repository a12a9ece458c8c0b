"""What `transport` needs of HTTP: a session of aiohttp's, and how replies and failures are read.

aiohttp and not httpx, whose requests take more of the event loop: a gateway shares it among all of
its own.
"""

from __future__ import annotations

import email.utils
import json
import time
import urllib.request
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import httpx

from memshare.llm.base import LLMError

# Then an idle connection isn't used again. Servers close theirs after 5 s (uvicorn's default, and
# vLLM's): a request that meets that moment is lost.
IDLE_SECONDS = 2.0
LOST = (aiohttp.ClientError, TimeoutError)  # no answer, or not the whole of it


def open_session(
    urls: Sequence[str], timeout: float, headers: Mapping[str, str]
) -> aiohttp.ClientSession:
    """A session of the running event loop for the servers ``urls``, without a limit of its own.

    ``timeout``: seconds without a byte; ten at most until connected.
    """
    secure = any(url.startswith("https:") for url in urls)
    return aiohttp.ClientSession(
        headers=headers,
        timeout=aiohttp.ClientTimeout(sock_connect=min(10.0, timeout), sock_read=timeout),
        connector=aiohttp.TCPConnector(
            limit=0,
            keepalive_timeout=IDLE_SECONDS,
            # httpx's certificates: certifi's, or those that SSL_CERT_FILE names.
            ssl=httpx.create_ssl_context() if secure else True,
        ),
        cookie_jar=aiohttp.DummyCookieJar(),
    )


def server_url(url: str, name: str) -> str:
    """``url`` without ``/v1`` at its end; raises `LLMError` if it can't be a server's."""
    bare = url.rstrip("/").removesuffix("/v1")
    try:
        usable = httpx.URL(bare).scheme in ("http", "https") and httpx.URL(bare).host
    except httpx.InvalidURL:
        usable = False
    if not usable:
        raise LLMError(f"{url!r} is no URL of an LLM server (model {name}): http://host:port")
    return bare


def proxy_of(url: str) -> str | None:
    """The environment's proxy for ``url`` (HTTP_PROXY, NO_PROXY and their like)."""
    parts = urlsplit(url)
    if urllib.request.proxy_bypass(parts.netloc):
        return None
    proxies = urllib.request.getproxies()
    return proxies.get(parts.scheme, proxies.get("all"))


async def event_data(response: aiohttp.ClientResponse) -> AsyncIterator[str]:
    """What server-sent events carry. (aiohttp's own reading by lines has a limit to their size.)

    What stands after the last line's end is no event, but for the [DONE] of servers that end there.
    """
    rest = b""
    async for part in response.content.iter_any():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            data = line.removeprefix(b"data:").strip()
            if line.startswith(b"data:") and data:
                yield data.decode(errors="replace")
    if rest.removeprefix(b"data:").strip() == b"[DONE]":
        yield "[DONE]"


def reason_of(error: Exception) -> str:
    """Why there was no answer, and the exception that said so."""
    kind = "no answer in time" if isinstance(error, TimeoutError) else "no connection"
    return f"{kind} ({type(error).__name__}{': ' + str(error) if str(error) else ''})"


def json_object(text: str | bytes) -> dict[str, Any] | None:
    """The object that ``text`` is the JSON of; None for all else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # no JSON; nested deeper than Python reads
        return None
    return value if isinstance(value, dict) else None


def error_message(text: str) -> str:
    """The message inside an OpenAI-style error, or the beginning of whatever came."""
    value = json_object(text)
    if value is None:
        return text[:500].strip()
    error = value.get("error", value.get("detail", value))
    return str(error.get("message", error) if isinstance(error, dict) else error)


def retry_after(header: str | None) -> float | None:
    """Seconds of a Retry-After header, given as a number or a date; None if there is none."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        moment = email.utils.parsedate_to_datetime(header).timestamp()
    except (ValueError, OverflowError):  # no date, or none that there is
        return None
    return max(0.0, moment - time.time())
