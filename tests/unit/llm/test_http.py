"""Connections to LLM servers: used again, never a broken one, and by the environment's proxy."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from memshare.llm import http
from memshare.llm.base import LLMUnavailable
from memshare.llm.transport import Transport


class Server:
    """Answers with the number of the connection; ``/break`` cuts it, ``/wait`` waits first."""

    def __init__(self) -> None:
        self.connections = 0
        self.open = 0
        self.go = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        mine = json.dumps({"n": self.connections}).encode()
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                told = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
                await reader.readexactly(int(told[1]) if told else 0)
                if b"/break " in head:
                    break
                if b"/wait " in head:
                    await self.go.wait()
                if b"/events " in head:
                    # One event in two pieces, longer than any buffer, then the connection stays.
                    event = b'data: {"long": "' + b"x" * 300_000 + b'"}\n\n'
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n")
                    writer.write(event[:1000])
                    await writer.drain()
                    writer.write(event[1000:])
                    await writer.drain()
                    await self.go.wait()
                more = b"connection: close\r\n" if b"/last " in head else b""
                length = b"content-length: %d\r\n" % len(mine)
                writer.write(b"HTTP/1.1 200 OK\r\n" + more + length + b"\r\n" + mine)
                await writer.drain()
                if more:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open -= 1
            writer.close()


@asynccontextmanager
async def running() -> AsyncIterator[tuple[Server, Transport]]:
    server = Server()
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    transport = Transport(
        f"http://127.0.0.1:{port}", "the-model", timeout=20.0, retries=0, concurrency=8
    )
    yield server, transport
    await transport.aclose()
    listener.close()


def run(body: Callable[[Server, Transport], Awaitable[None]]) -> None:
    async def inside() -> None:
        async with running() as (server, transport):
            await body(server, transport)

    asyncio.run(asyncio.wait_for(inside(), 60))


def test_connections_are_used_again() -> None:
    async def body(server: Server, transport: Transport) -> None:
        for _ in range(3):
            assert await transport.get("/") == {"n": 1}
        waiting = [asyncio.create_task(transport.get("/wait")) for _ in range(4)]
        await asyncio.sleep(0.05)
        assert await transport.get("/") == {"n": 5}
        server.go.set()
        assert {reply["n"] for reply in await asyncio.gather(*waiting)} == {1, 2, 3, 4}
        await asyncio.gather(*(transport.post("/", {"a": 1}) for _ in range(5)))
        assert server.connections == 5

    run(body)


def test_a_broken_connection_is_not_used_again() -> None:
    async def body(server: Server, transport: Transport) -> None:
        with pytest.raises(LLMUnavailable, match="no connection"):
            await transport.post("/break", {})
        assert await transport.get("/") == {"n": server.connections}

    run(body)


def test_one_that_the_server_closed_while_idle_is_opened_again() -> None:
    async def body(server: Server, transport: Transport) -> None:
        assert await transport.get("/last") == {"n": 1}
        assert await transport.post("/", {}) == {"n": 2}

    run(body)


def test_one_that_was_idle_for_long_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server may be about to close it."""
    monkeypatch.setattr(http, "IDLE_SECONDS", 0.05)

    async def body(server: Server, transport: Transport) -> None:
        assert await transport.get("/") == {"n": 1}
        await asyncio.sleep(0.2)
        assert await transport.get("/") == {"n": 2}

    run(body)


def test_giving_up_closes_the_connection() -> None:
    async def body(server: Server, transport: Transport) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(transport.get("/wait"), 0.1)
        assert await transport.get("/") == {"n": 2}
        events = transport.events("/events", {})
        async for event in events:
            assert len(event["long"]) == 300_000
            break  # its body is not read to the end
        await events.aclose()
        assert await transport.get("/") == {"n": 3}
        await transport.aclose()
        await asyncio.sleep(0.1)
        server.go.set()
        await asyncio.sleep(0.1)
        assert server.open == 0

    run(body)


def test_a_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(server: Server, transport: Transport) -> None:
        monkeypatch.setenv("http_proxy", transport.url)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        settings = {"timeout": 20.0, "retries": 0, "concurrency": 8}
        for url in (transport.url, "http://llm.example"):  # the server is the other one's proxy
            other = Transport(url, "the-model", **settings)
            assert "n" in await other.get("/")
            await other.aclose()
        assert server.connections == 2

    run(body)
