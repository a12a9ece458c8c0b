"""Whether an LLM is there is asked as its client asks: by the same proxy and certificates."""

from __future__ import annotations

import asyncio
import re
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

from memshare.config import LLMConfig
from memshare.gateway.state import LLMProbe
from memshare.llm.base import LLMUnavailable
from memshare.llm.transport import Transport
from tests.postgres import free_port

HOSTED = "http://llm.example/v1"
NAMES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, *map(str.upper, NAMES), "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}")
    await writer.drain()
    writer.close()


async def told(url: str) -> str:
    """What the probe says of ``url``, once a client has found the same."""
    probe = LLMProbe(LLMConfig(backend="openai", url=url))
    client = Transport(url, "the-model", timeout=5.0, retries=0, concurrency=1)
    try:
        state = await probe.state()
        try:
            await client.get("/v1/models")
            assert state == "reachable"
        except LLMUnavailable:
            assert state.startswith("unreachable")
    finally:
        await probe.aclose()
        await client.aclose()
    return state


def test_by_the_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    async def inside() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        here = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        monkeypatch.setenv("http_proxy", here)  # the server is the other one's proxy
        assert await told(HOSTED) == "reachable"
        monkeypatch.setenv("no_proxy", "llm.example")
        assert (await told(HOSTED)).startswith("unreachable: http://llm.example/v1/models: ")
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
        assert (await told(here)).startswith("unreachable")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert await told(here) == "reachable"
        server.close()

    asyncio.run(asyncio.wait_for(inside(), 60))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate")
def test_by_the_certificates_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    made += ["-subj", "/CN=here", "-addext", "subjectAltName=IP:127.0.0.1"]
    made += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(made, check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)

    async def inside() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        assert re.match("unreachable: .*Cert", await told(url))
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert await told(url) == "reachable"
        server.close()

    asyncio.run(asyncio.wait_for(inside(), 60))


def test_a_password_in_the_url_is_not_told() -> None:
    """/readyz is open to all."""
    said = asyncio.run(told(f"http://me:s3cret@127.0.0.1:{free_port()}"))
    assert said.startswith("unreachable: http://***@127.0.0.1:")
