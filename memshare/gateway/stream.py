"""Streaming an answer as server-sent events, and keeping what was said for the scorer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse

from memshare.gateway.disconnect import while_connected
from memshare.gateway.errors import error_body, error_of
from memshare.gateway.logs import logger, where
from memshare.gateway.state import Gateway
from memshare.gateway.wire import json_bytes
from memshare.gateway.write import submit
from memshare.llm.base import texts_of
from memshare.records import Memory, Pair


class _Spoken:
    """What the first choice has said so far."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.finish_reason = "none"
        self.tools = False

    def hear(self, chunk: Mapping[str, Any]) -> bool:
        """Whether ``chunk`` ends the answer."""
        before = self.finish_reason
        for choice in chunk.get("choices") or ():
            if choice.get("index", 0) != 0:
                continue
            delta = choice.get("delta") or {}
            self.text += texts_of(delta.get("content"))
            self.tools = self.tools or bool(delta.get("tool_calls"))
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        return before == "none" != self.finish_reason


def _event(value: Mapping[str, Any]) -> bytes:
    return b"data: %b\n\n" % json_bytes(value)


async def events(
    gateway: Gateway,
    request: Request,
    chunks: AsyncIterator[Mapping[str, Any]],
    note: Mapping[str, Any],
    pair: Pair | None,
    shown: Sequence[Memory],
) -> StreamingResponse:
    """Pass ``chunks`` on, the first with ``memshare``; queue the pair when the answer is whole.

    The chunk that ends it is held back until the pair is queued: whoever has it may go away.

    The first chunk is awaited here, so that an LLM that refuses or is away is an ordinary 4xx or
    503. What fails later comes as an ``error`` event, without [DONE]. An answer whose client has
    gone away is not stored: nobody has seen it whole.
    """
    with gateway.shared.stage("llm"):
        first = await while_connected(request, anext(chunks, None))

    async def heard(spoken: _Spoken, chunk: Mapping[str, Any]) -> None:
        if spoken.hear(chunk) and pair:
            text = "".join(spoken.text)
            await submit(gateway, pair, shown, text, spoken.finish_reason, spoken.tools)

    async def body() -> AsyncIterator[bytes]:
        spoken = _Spoken()
        try:
            if first is not None:
                await heard(spoken, first)
                yield _event({**first, "memshare": note})
            async for chunk in chunks:
                await heard(spoken, chunk)
                yield _event(chunk)
        except Exception as error:
            known = error_of(error)
            logger.warning("a stream broke off", extra={"failure": where(error)})
            yield _event(error_body(known.status_code, str(known.detail), code=known.code))
            return
        finally:
            if isinstance(chunks, AsyncGenerator):
                await chunks.aclose()  # a client that went away: the LLM need not go on
        yield b"data: [DONE]\n\n"

    return StreamingResponse(
        body(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
    )
