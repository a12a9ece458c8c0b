"""Several gateways on one database: what is written through one is found through all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import httpx
import pytest

from memshare.pool.store import PoolStore
from memshare.retrieval.encoder import Encoder
from tests.conftest import DATABASES, database_url
from tests.gateways import gateway
from tests.loop import loop_config
from tests.retrieving import publish_now
from tests.tiny import tiny_encoder

SOON_SECONDS = 1.0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module", params=DATABASES)
def urls(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, models: Path
) -> Iterator[tuple[str, str, str, Path]]:
    """Two gateways, their database's URL, and the folder that holds their generations.

    On PostgreSQL polling is too rare to be in time, so that only a notification can be; on SQLite
    it is all there is, as often as by default.
    """
    folder = tmp_path_factory.mktemp("shared")
    database = database_url(request.param, request, folder / "pool.db")
    shared = {
        "database_url": database,
        "retriever": {"poll_seconds": 0.5 if request.param == "sqlite" else 10.0},
        "run": {"generations": str(folder / "generations")},
        "pools": {
            "near": {
                "threshold": 0,
                "near_duplicate": 0.9,
                "near_duplicate_action": "merge",
            }
        },
    }
    with (
        gateway(folder / "a", models, **shared) as a,
        gateway(folder / "b", models, **shared) as b,
    ):
        yield a, b, database, folder / "generations"


def write(url: str, prompt: str, pool: str = "keep") -> str:
    item = {"pool": pool, "prompt": prompt, "answer": f"of {prompt}"}
    reply = httpx.post(f"{url}/v1/memories", json={"items": [item]}, timeout=60)
    assert reply.status_code == 201, reply.text
    return str(reply.json()["results"][0]["id"])


def found(url: str, prompt: str, pool: str = "keep") -> list[str]:
    search = {"pool": pool, "query": prompt, "k": 50}
    reply = httpx.post(f"{url}/v1/memories/search", json=search, timeout=60)
    assert reply.status_code == 200, reply.text
    return [memory["id"] for memory in reply.json()["memories"]]


def seconds_until(condition: Callable[[], bool]) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < 30, "never"
        time.sleep(0.01)
    return time.monotonic() - began


def test_each_finds_at_once_what_the_other_wrote(urls: tuple[str, str, str, Path]) -> None:
    a, b, _, _ = urls
    time.sleep(1)  # both listen by now
    lags = []
    for turn in range(6):
        writer, reader = (a, b) if turn % 2 else (b, a)
        prompt = f"turn {turn} " + "xyzuvw"[turn] * 3
        id_ = write(writer, prompt)
        lags.append(seconds_until(lambda: id_ in found(reader, prompt)))  # noqa: B023
    httpx.delete(f"{a}/v1/memories/{id_}").raise_for_status()
    lags.append(seconds_until(lambda: id_ not in found(b, prompt)))
    assert max(lags) < SOON_SECONDS, f"seconds until seen by the other gateway: {lags}"


def test_writers_of_both_lose_and_double_nothing(urls: tuple[str, str, str, Path]) -> None:
    a, b, database, _ = urls

    def work(place: int) -> list[str]:
        url = (a, b)[place % 2]
        return [write(url, f"writer {place} {n}", "strict") for n in range(5)] + [
            write(url, f"everybody's {n}", "strict") for n in range(5)
        ]

    with ThreadPoolExecutor(8) as pool:
        answered = list(pool.map(work, range(8)))
    with PoolStore.open(database) as store:
        memories = list(store.iter("strict"))
        assert [change.seq for change in store.changes("strict", 0)] == list(range(1, 46))
    assert {id_ for ids in answered for id_ in ids} == {memory.id for memory in memories}
    assert len(memories) == len({memory.prompt for memory in memories}) == 8 * 5 + 5
    for url in (a, b):
        assert set(found(url, "writer", "strict")) == {memory.id for memory in memories}


def test_near_duplicates_written_at_one_moment_leave_the_first(
    urls: tuple[str, str, str, Path],
) -> None:
    """Each gateway searched before the other one's was there; one of the two stays, for both."""
    a, b, database, _ = urls

    def add(url: str, prompt: str) -> tuple[str, str]:
        item: dict[str, Any] = {"pool": "near", "prompt": prompt, "metadata": {prompt[-1]: True}}
        item["answer"] = "the same answer every time"
        moment.wait()
        reply = httpx.post(f"{url}/v1/memories", json={"items": [item]}, timeout=60)
        (result,) = reply.raise_for_status().json()["results"]
        return result["status"], result["id"]

    marks = ".!?;"
    moment = Barrier(len(marks))
    overtaken = 0
    with ThreadPoolExecutor(len(marks)) as threads, PoolStore.open(database) as store:
        for turn in range(12):
            subject = " ".join("abcdefghijklmnopqrstuvwx"[2 * turn :][:2] * 8)
            prompts = [f"{subject} {subject}{mark}" for mark in marks]
            before = store.last_seq("near")
            told = list(threads.map(add, (a, b) * 2, prompts))
            assert sorted(status for status, _ in told) == ["duplicate"] * 3 + ["stored"]
            (id_,) = {id_ for _, id_ in told}
            living = [memory for memory in store.iter("near") if memory.seq > before]
            assert [memory.id for memory in living] == [id_]
            assert set(living[0].metadata) == set(marks), "what the others knew is lost"
            added = [c for c in store.changes("near", before) if c.kind == "add"]
            assert added[0].id == id_, "the first one is to stay"
            overtaken += len(added) - 1
    print(f"{overtaken} near-duplicates were stored for a moment")


def test_a_generation_swaps_in_everywhere(
    urls: tuple[str, str, str, Path], tmp_path: Path, models: Path
) -> None:
    a, b, database, generations = urls
    id_ = write(a, "before the swap")
    folder = tiny_encoder(models / "next", seed=1)
    config = loop_config(
        tmp_path / "trainer", models, database_url=database,
        encoder={"model": str(folder)}, run={"generations": str(generations)},
    )  # fmt: skip
    with PoolStore.open(database) as store:
        number = publish_now(store, config, Encoder.from_folder(folder, device="cpu"))

    def serves(url: str) -> bool:
        search = {"pool": "keep", "query": "before the swap", "k": 1}
        reply = httpx.post(f"{url}/v1/memories/search", json=search, timeout=60).json()
        return bool(reply["generation"] == number and reply["memories"][0]["id"] == id_)

    for url in (a, b):
        seconds_until(lambda: serves(url))  # noqa: B023
