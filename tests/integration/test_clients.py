"""The native clients and the MCP server against a gateway that asks for keys."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import mcp
import pytest
from mcp.client.stdio import StdioServerParameters

import memshare
from memshare.client import InvalidRequest, NotFound, PermissionDenied
from memshare.pool.keys import KeyRing
from memshare.pool.store import PoolStore
from tests.gateways import ROOT, gateway


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, str]]:
    """The gateway's URL, an agent's key for the pool ``keep``, and an admin's key."""
    run_dir, models = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("models")
    with PoolStore.open(f"sqlite:///{run_dir}/pool.db") as store:
        ring = KeyRing(store.database)
        _, agent = ring.create("ann", {"keep": ["read", "write"]})
        _, admin = ring.create("root", {"*": ["admin"]})
    with gateway(run_dir, models, "--set", "gateway.keys=required") as url:
        yield url, agent, admin


def test_the_client_does_all_that_the_gateway_does(keyed: tuple[str, str, str]) -> None:
    url, agent, admin = keyed
    with memshare.Client(url, agent) as client, memshare.Client(url, admin) as root:
        added = client.add("keep", "red apples", "sweet", model="m", metadata={"n": 1})
        assert added.status == "stored" and added.id
        again = client.add("keep", "Red  apples", "sweet")
        assert (again.status, again.id) == ("duplicate", added.id)
        many = client.add_many(
            [{"pool": "keep", "prompt": f"pear {n}", "answer": "x"} for n in range(4)]
        )
        assert [result.status for result in many] == ["stored"] * 4
        memory = client.get(added.id)
        assert (memory.prompt, memory.agent, memory.metadata) == ("red apples", "ann", {"n": 1})
        found = client.search("keep", "red apples", 1)
        assert found.generation == 0 and found.memories[0].id == added.id
        assert found.memories[0].similarity is not None
        assert client.search("keep", "red apples", agent="nobody").memories == ()
        assert client.search("keep", "red apples", metadata={"no": "key"}).memories == ()
        standing = root.feedback(added.id, "up", "it helped")
        assert standing.votes == 1 and client.get(added.id).standing == standing.standing > 0
        page = client.list("keep", limit=3)
        rest = client.list("keep", page.next_cursor)
        assert len(page.memories) == 3 and len(rest.memories) == 2 and rest.next_cursor is None
        reply = client.chat("red apples", shots=1, write=False, max_tokens=4)
        assert reply.text and reply.memories == (added.id,) and reply.write == "off"
        assert reply.raw["usage"]["completion_tokens"] == 4
        chunks = list(client.stream("red apples", shots=1, write=False, max_tokens=4))
        assert "".join(chunk.text for chunk in chunks) == reply.text
        assert chunks[0].note is not None and chunks[0].note["memories"] == [added.id]
        assert client.generations().serving == 0
        item = {"pool": "strict", "prompt": "p", "answer": "a", "agent": "bob", "score": 7}
        (imported,) = root.add_many([item], import_=True)
        assert imported.id and root.get(imported.id).agent == "bob"
        with pytest.raises(NotFound):
            client.get(imported.id)
        with pytest.raises(PermissionDenied, match="strict"):
            client.search("strict", "p")
        with pytest.raises(PermissionDenied, match="can't judge it"):
            client.feedback(added.id, "up")
        with pytest.raises(PermissionDenied):
            client.activate(0)
        with pytest.raises(NotFound):
            root.activate(7)
        with pytest.raises(InvalidRequest, match="answer"):
            client.add("keep", "q", " ")
        client.delete(added.id)
        with pytest.raises(NotFound) as gone:
            client.delete(added.id)
        assert gone.value.code == "unknown_memory" and gone.value.request_id


def test_the_async_client_does_the_same_at_once(keyed: tuple[str, str, str]) -> None:
    url, agent, _ = keyed

    async def body() -> None:
        async with memshare.AsyncClient(url, agent) as client:
            prompts = [f"number {n}" for n in range(8)]
            added = await asyncio.gather(*(client.add("keep", p, "x") for p in prompts))
            found = await asyncio.gather(*(client.search("keep", p, 1) for p in prompts))
            assert [f.memories[0].id for f in found] == [result.id for result in added]
            text = ""
            async for chunk in client.stream("number 1", write=False, max_tokens=4):
                text += chunk.text
            assert text == (await client.chat("number 1", write=False, max_tokens=4)).text
            with pytest.raises(PermissionDenied):
                async for _ in client.stream("x", pool="strict"):
                    pass
            for size in (2_000_000, 20_000_000):
                with pytest.raises(InvalidRequest, match="larger than 1000000 bytes"):
                    await client.add("keep", "long", "x" * size)

    asyncio.run(body())


def test_an_agent_joins_a_pool_over_mcp(keyed: tuple[str, str, str]) -> None:
    url, agent, admin = keyed
    with memshare.Client(url, admin) as root:
        other = root.add("keep", "how do moles see", "Very well.").id
    server = StdioServerParameters(
        command=sys.executable,
        args=["-m", "memshare.cli", "mcp", "--pool", "keep", "--url", url],
        env={"MEMSHARE_KEY": agent, "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        cwd=ROOT,
    )

    async def body() -> None:
        async with mcp.Client(server) as client:
            tools = {tool.name: tool for tool in (await client.list_tools()).tools}
            assert all(tool.output_schema for tool in tools.values())
            assert set(tools) == {"search_memories", "add_memory", "give_feedback"}
            assert all(tool.description for tool in tools.values())

            async def call(name: str, **arguments: Any) -> Any:
                result = await client.call_tool(name, arguments)
                assert not result.is_error, result.content
                return result.structured_content

            added = await call("add_memory", prompt="how do owls see", answer="In the dark.")
            assert added["status"] == "stored"
            found = await call("search_memories", query="how do owls see", k=1)
            (memory,) = found["memories"]
            assert (memory["id"], memory["agent"]) == (added["id"], "ann")
            given = await call("give_feedback", id=other, value="down", comment="wrong")
            assert given["standing"] < 0
            for name, arguments, words in (
                ("give_feedback", {"id": "none", "value": "up"}, "no memory"),
                ("give_feedback", {"id": added["id"], "value": "up"}, "can't judge it"),
                ("add_memory", {"prompt": "q", "answer": " "}, "answer: is empty"),
                ("search_memories", {"query": "q", "k": 0}, "k"),
            ):
                refused = await client.call_tool(name, arguments)
                assert refused.is_error and words in refused.content[0].text  # type: ignore[union-attr]

    asyncio.run(body())


def test_mcp_without_a_valid_key_tells_the_agent_why(keyed: tuple[str, str, str]) -> None:
    url, _, _ = keyed
    server = StdioServerParameters(
        command=sys.executable,
        args=["-m", "memshare.cli", "mcp", "--pool", "keep", "--url", url],
        env={"PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        cwd=ROOT,
    )

    async def body() -> None:
        async with mcp.Client(server) as client:
            refused = await client.call_tool("search_memories", {"query": "q"})
            assert refused.is_error and "a key is needed" in refused.content[0].text  # type: ignore[union-attr]

    asyncio.run(body())


def test_mcp_stops_at_once() -> None:
    command = [sys.executable, "-m", "memshare.cli", "mcp", "--pool", "keep"]
    hello = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
    for name in ("SIGINT", "SIGTERM", "no input"):
        with subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdin and process.stdout and process.stderr
            try:
                process.stdin.write(json.dumps(hello).encode() + b"\n")
                process.stdin.flush()
                assert json.loads(process.stdout.readline())["id"] == 1
                if name == "no input":
                    process.stdin.close()
                else:
                    process.send_signal(signal.Signals[name])
                process.wait(10)
            finally:
                process.kill()
            assert not process.stdout.read() and b"Traceback" not in process.stderr.read()


def test_mcp_over_http(keyed: tuple[str, str, str]) -> None:
    url, agent, _ = keyed
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "memshare.cli", "mcp", "--pool", "keep", "--url", url]
    process = subprocess.Popen(
        [*command, "--http", str(port)], cwd=ROOT, env={**os.environ, "MEMSHARE_KEY": agent}
    )

    async def body() -> None:
        async with mcp.Client(f"http://127.0.0.1:{port}/mcp") as client:
            added = {"prompt": "who asks over HTTP", "answer": "An agent."}
            assert not (await client.call_tool("add_memory", added)).is_error
            found = await client.call_tool("search_memories", {"query": "who asks over HTTP"})
            assert found.structured_content["memories"][0]["answer"] == "An agent."

    try:
        deadline = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        asyncio.run(body())
    finally:
        process.terminate()
        process.wait(30)
