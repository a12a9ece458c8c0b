"""From a finished answer to the scoring queue."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from memshare.gateway.state import Gateway
from memshare.sharing import Pair


async def submit(
    gateway: Gateway, pair: Pair, text: str, finish_reason: str, tools: bool
) -> dict[str, Any]:
    """Hand a finished answer to the scoring queue; returns what to say about it."""
    if tools or finish_reason not in ("stop", "length"):
        reason = "the answer calls tools" if tools else f"finish reason {finish_reason}"
        return {"write": "off", "reason": reason}
    if await gateway.queue.submit(replace(pair, answer=text.strip(), finish_reason=finish_reason)):
        return {"write": "pending"}
    return {"write": "dropped", "reason": "the scoring queue is full"}
