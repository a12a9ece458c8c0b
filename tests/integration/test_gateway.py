"""The gateway as users meet it: a process on a port, and OpenAI's own client."""

from __future__ import annotations

import concurrent.futures
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from memshare.cli import main
from memshare.files import RunLocked, run_lock
from tests.gateways import START_SECONDS, gateway, launch
from tests.loop import loop_config_file


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[str]:
    with gateway(tmp_path_factory.mktemp("run"), models) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def add(url: str, *prompts: str) -> list[str]:
    items = [{"pool": "keep", "prompt": prompt, "answer": f"of {prompt}"} for prompt in prompts]
    reply = httpx.post(f"{url}/v1/memories", json={"items": items}, timeout=60)
    assert reply.status_code == 201, reply.text
    return [result["id"] for result in reply.json()["results"]]


def test_openai_client_chats(url: str, client: openai.OpenAI) -> None:
    ids = add(url, "red apples", "green pears")
    model = client.models.list().data[0].id
    reply = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "red apples"}],
        extra_body={"memory": {"pool": "keep", "shots": 1, "write": False}},
    )
    assert reply.choices[0].message.content
    assert reply.usage is not None and reply.usage.completion_tokens == 8
    assert reply.model == model
    note = (reply.model_extra or {})["memshare"]
    assert (note["generation"], note["memories"], note["write"]) == (0, [ids[0]], "off")


def test_openai_client_streams(url: str, client: openai.OpenAI) -> None:
    (id_,) = add(url, "blue plums")
    arguments: dict[str, Any] = {
        "model": "any",
        "messages": [{"role": "user", "content": "blue plums"}],
        "extra_body": {"memory": {"shots": 1}},
    }
    whole = client.chat.completions.create(**arguments)
    chunks = list(client.chat.completions.create(stream=True, **arguments))
    note = (chunks[0].model_extra or {})["memshare"]
    assert note["memories"] == [id_]
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert said == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"


def test_openai_client_understands_the_errors(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="nowhere") as missing:
        create(model="m", messages=messages, extra_body={"memory": {"pool": "nowhere"}})
    assert missing.value.code == "unknown_pool"
    with pytest.raises(openai.UnprocessableEntityError, match="messages"):
        create(model="m", messages=[])
    with pytest.raises(openai.BadRequestError, match="tools"):
        create(model="m", messages=messages, tools=[{"type": "function"}])  # type: ignore[list-item]


def ends(url: str, begun: str) -> bool:
    """Whether the gateway closes a connection that goes on with 4 MB after ``begun``."""
    place = httpx.URL(url)
    with socket.create_connection((place.host, place.port or 0), timeout=5) as connection:
        try:
            connection.sendall(begun.encode())
            for _ in range(64):
                connection.sendall(b"x" * 2**16)
            while connection.recv(2**16):
                pass
        except TimeoutError:
            return False
        except OSError:  # reset: it has not read all of that
            pass
    return True


def test_headers_have_an_end(url: str) -> None:
    """Nobody needs a key to send them."""
    host = "Host: 127.0.0.1\r\n"
    chunked = "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n"
    assert ends(url, f"GET /healthz HTTP/1.1\r\n{host}X: ")
    assert ends(url, "GET /healthz?")
    assert ends(url, f"POST /v1/memories HTTP/1.1\r\n{host}{chunked}X: ")
    with httpx.Client(base_url=url) as client:  # one connection, on which each is counted alone
        for _ in range(10):
            assert client.get("/healthz", headers={"X": "x" * 50_000}).status_code == 200
        item = {"pool": "keep", "prompt": "long", "answer": "x", "metadata": {"x": "x" * 900_000}}
        reply = client.post("/v1/memories", json={"items": [item]})
        assert reply.status_code == 422 and "at most 32768" in reply.text


def test_many_clients_write_and_each_finds_its_own_at_once(url: str) -> None:
    def one(number: int) -> None:
        prompt = f"writer {number} says {'abcdefghijklmnop'[number] * 4}"
        (id_,) = add(url, prompt)
        search = {"pool": "keep", "query": prompt, "k": 3}
        reply = httpx.post(f"{url}/v1/memories/search", json=search, timeout=60)
        assert id_ in [memory["id"] for memory in reply.json()["memories"]]

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(16)))


def test_restart_keeps_memories_and_finishes_what_was_accepted(
    tmp_path: Path, models: Path
) -> None:
    with gateway(tmp_path, models, gateway={"score_writes": True}) as url:
        items = [{"pool": "keep", "prompt": f"question {n}", "answer": "yes"} for n in range(20)]
        reply = httpx.post(f"{url}/v1/memories", json={"items": items}, timeout=60)
        assert reply.status_code == 202
    with gateway(tmp_path, models) as url:  # SIGTERM came right after the 202
        page = httpx.get(f"{url}/v1/memories?pool=keep").json()
        assert {memory["prompt"] for memory in page["memories"]} == {i["prompt"] for i in items}


def refused(config: Path, *more: str) -> str:
    """The log of a gateway that must not start."""
    process = launch("serve/gateway.py", config, *more)
    _, log = process.communicate(timeout=START_SECONDS)
    assert process.returncode not in (0, None) and "Traceback" not in log, log
    return log


def test_second_gateway_on_a_run_folder_is_refused(tmp_path: Path, models: Path) -> None:
    config = loop_config_file(tmp_path, models)
    with run_lock(tmp_path, "gateway"):
        log = refused(config, "--port", "0")
    assert "another gateway is running there" in log and str(os.getpid()) in log
    with run_lock(tmp_path, "gateway"), pytest.raises(RunLocked), run_lock(tmp_path, "gateway"):
        pass


def test_addresses_that_can_not_be_served(tmp_path: Path, models: Path) -> None:
    config = loop_config_file(tmp_path, models)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"127.0.0.1:{port}: can't listen there" in refused(config, "--port", port)
    log = refused(config, "--host", "0.0.0.0", "--port", "0")
    assert "memshare keys create" in log


def test_keys_are_asked_for_off_loopback_and_where_the_configuration_says_so(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = loop_config_file(tmp_path, models)
    create = ["keys", "create", "ann", "--config", str(config), "--right", "keep=read,write"]
    assert main(create) == 0
    secret = capsys.readouterr().out.strip()
    for address in (["--host", "0.0.0.0"], ["--set", "gateway.keys=required"]):
        with gateway(tmp_path, models, *address) as url:
            url = url.replace("0.0.0.0", "127.0.0.1")
            assert httpx.get(f"{url}/v1/models").status_code == 401
            wrong = openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
            with wrong, pytest.raises(openai.AuthenticationError, match="unknown"):
                wrong.models.list()
            with openai.OpenAI(base_url=f"{url}/v1", api_key=secret, max_retries=0) as client:
                create_chat = client.chat.completions.create
                messages: Any = [{"role": "user", "content": "hi"}]
                reply = create_chat(model="m", messages=messages)
                assert reply.usage is not None and reply.usage.total_tokens > 0
                with pytest.raises(openai.PermissionDeniedError, match="strict") as refused:
                    body = {"memory": {"pool": "strict"}}
                    create_chat(model="m", messages=messages, extra_body=body)
                assert refused.value.code == "forbidden" and refused.value.request_id


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("encoder.model=/no/such/folder", "/no/such/folder"),
        ("agent_llm.model=/no/such/folder", "/no/such/folder"),
        ("gateway.prot=1", "gateway.prot"),
        ("database_url=sqlite:////proc/none/pool.db", "/proc/none"),
    ],
)
def test_what_is_missing_is_named(
    tmp_path: Path, models: Path, override: str, complaint: str
) -> None:
    config = loop_config_file(tmp_path, models)
    assert complaint in refused(config, "--port", "0", "--set", override)
