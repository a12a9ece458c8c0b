"""Where a gateway that was started as a program listens, and whether it is up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx

_READY_SECONDS = 5.0
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def written_ns(record: Path) -> int:
    """When the run folder's ``gateway.json`` was written, in nanoseconds; 0: never."""
    return record.stat().st_mtime_ns if record.exists() else 0


def url_of(record: Path, before: int) -> str | None:
    """Where the gateway can be asked from this machine, by the ``record`` that it writes.

    It does so once what it needs is loaded, an LLM in its own process among that. None until it is
    another one than ``before`` (`written_ns`): a gateway that has gone left one, too.
    """
    if written_ns(record) == before:
        return None
    url = httpx.URL(json.loads(record.read_text(encoding="utf-8"))["url"])
    return str(url.copy_with(host=_EVERYWHERE.get(url.host, url.host)))


def state_of(url: str) -> dict[str, Any]:
    """What /readyz says; empty while nobody answers."""
    try:
        reply = httpx.get(f"{url}/readyz", timeout=_READY_SECONDS, trust_env=False)
        return dict(reply.json())
    except (httpx.HTTPError, ValueError):
        return {}


def missing(state: dict[str, Any]) -> str | None:
    """What is not there yet by what /readyz says; None if the gateway and all its LLMs are."""
    if not state:
        return "the gateway does not answer"
    if not state.get("ready"):
        return f"the gateway is not ready: {state.get('reason')}"
    llms = state.get("llm", {}).items()
    away = [f"{name} {value}" for name, value in llms if value.startswith(("unre", "unkn"))]
    return f"LLMs: {', '.join(away)}" if away else None
