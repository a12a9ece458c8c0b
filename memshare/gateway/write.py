"""From a finished answer to the scoring queue, and no answer where that is full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from memshare.gateway.errors import ApiError
from memshare.gateway.state import Gateway
from memshare.records import Memory, Pair


async def check_room(gateway: Gateway) -> None:
    """`ApiError` 429 if the scorer is too far behind: before the work, for none is thrown away."""
    if await gateway.queue.full():
        gateway.metrics.shed.labels("queue").inc()
        raise ApiError(429, "too many pairs wait for the scorer; try again", code="queue_full")


async def submit(
    gateway: Gateway,
    pair: Pair,
    shown: Sequence[Memory],
    text: str,
    finish_reason: str,
    tools: bool,
) -> dict[str, Any]:
    """Hand a finished answer to the scoring queue, durably; returns what to say about it.

    ``shown``: the memories that were in its prompt.
    """
    if tools or finish_reason not in ("stop", "length"):
        reason = "the answer calls tools" if tools else f"finish reason {finish_reason}"
        return {"write": "off", "reason": reason}
    text = text.strip()
    copy_of = None
    if shown:
        copy_of = await gateway.shared.read(gateway.shared.writer.guard.copied, text, shown)
    await gateway.queue.put(
        [replace(pair, answer=text, finish_reason=finish_reason, copy_of=copy_of)]
    )
    return {"write": "pending"}
