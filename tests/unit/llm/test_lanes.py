"""Lanes: one connection a request under way, used again, and never a broken one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
import pytest

from memshare.llm import lanes
from memshare.llm.lanes import Lanes


class Server:
    """Answers with the number of the connection; ``/break`` cuts it, ``/wait`` waits first."""

    def __init__(self) -> None:
        self.connections = 0
        self.open = 0
        self.go = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        mine = str(self.connections).encode()
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if b" /break " in head:
                    break
                if b" /wait " in head:
                    await self.go.wait()
                size = b"100" if b" /half " in head else b"%d" % len(mine)
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: " + size + b"\r\n\r\n" + mine)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open -= 1
            writer.close()


@asynccontextmanager
async def running() -> AsyncIterator[tuple[Server, httpx.AsyncClient]]:
    server = Server()
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    async with httpx.AsyncClient(
        transport=Lanes(), base_url=f"http://127.0.0.1:{port}", timeout=20
    ) as client:
        yield server, client
    listener.close()


def run(body: Callable[[Server, httpx.AsyncClient], Awaitable[None]]) -> None:
    async def inside() -> None:
        async with running() as (server, client):
            await body(server, client)

    asyncio.run(inside())


def test_one_connection_a_request_under_way_and_the_last_used_is_used_next() -> None:
    async def body(server: Server, client: httpx.AsyncClient) -> None:
        for _ in range(3):
            assert (await client.get("/")).text == "1"
        waiting = [asyncio.create_task(client.get("/wait")) for _ in range(4)]
        await asyncio.sleep(0.05)
        assert (await client.get("/")).text == "5"
        server.go.set()
        assert {reply.text for reply in await asyncio.gather(*waiting)} == set("1234")
        await asyncio.gather(*(client.get("/") for _ in range(5)))
        assert server.connections == 5

    run(body)


def test_a_broken_connection_is_not_used_again() -> None:
    async def body(server: Server, client: httpx.AsyncClient) -> None:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get("/break")
        assert (await client.get("/")).text == "2"

    run(body)


def test_one_that_the_server_closed_while_idle_is_opened_again() -> None:
    async def body(server: Server, client: httpx.AsyncClient) -> None:
        reply = await client.get("/", headers={"connection": "close"})
        assert reply.text == "1"
        assert (await client.get("/")).text == "2"

    run(body)


def test_one_that_was_idle_for_long_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server may be about to close it."""
    monkeypatch.setattr(lanes, "IDLE_SECONDS", 0.05)

    async def body(server: Server, client: httpx.AsyncClient) -> None:
        assert (await client.get("/")).text == "1"
        await asyncio.sleep(0.1)
        assert (await client.get("/")).text == "2"

    run(body)


def test_giving_up_closes_the_connection() -> None:
    async def body(server: Server, client: httpx.AsyncClient) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.get("/wait"), 0.05)
        with pytest.raises(httpx.ReadTimeout):
            await client.get("/wait", timeout=0.05)
        async with client.stream("GET", "/half"):
            pass  # its body is not read to the end
        assert (await client.get("/")).text == "4"

    run(body)


def test_only_so_many_idle_ones_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "KEPT", 2)

    async def body(server: Server, client: httpx.AsyncClient) -> None:
        waiting = [asyncio.create_task(client.get("/wait")) for _ in range(5)]
        await asyncio.sleep(0.1)
        server.go.set()
        await asyncio.gather(*waiting)
        await asyncio.sleep(0.1)
        assert server.open == 2
        await client.aclose()
        await asyncio.sleep(0.1)
        assert server.open == 0

    run(body)


def test_a_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(server: Server, client: httpx.AsyncClient) -> None:
        monkeypatch.setenv("http_proxy", str(client.base_url))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert (await client.get("/")).text == "1"
        assert (await client.get("http://llm.example/")).text == "2"  # the server is the proxy

    run(body)
