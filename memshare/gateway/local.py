"""Whether a request was sent on this machine, and not by a web page from elsewhere."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def foreign(headers: Mapping[str, str]) -> str | None:
    """The header that says that the request isn't of this machine; None if none does.

    A browser here carries out requests for any page. It names the page in Origin; and a page whose
    own host name was made to lead to this machine (DNS rebinding) is of one origin with the
    gateway, but for that name in Host.
    """
    host, origin = headers.get("host", ""), headers.get("origin")
    if not _named_loopback(f"//{host}"):
        return f"Host {host!r}"
    if origin is not None and not _named_loopback(origin):
        return f"Origin {origin!r}"
    return None


def _named_loopback(url: str) -> bool:
    try:
        return is_loopback(urlsplit(url).hostname or "")
    except ValueError:  # such as a bracket that isn't closed
        return False
