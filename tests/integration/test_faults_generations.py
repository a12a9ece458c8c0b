"""Damaged and half-copied generations put in place under load: the old one serves on."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from memshare.pool.store import PoolStore
from memshare.records import Hit, SearchAnswer
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.shelf import stage_current, write_current
from tests.faults import Load, check
from tests.gateways import gateway
from tests.loop import loop_config
from tests.retrieving import fill, publish_now
from tests.swapping import Expected, mixed
from tests.tiny import tiny_encoder

NOTICED_SECONDS = 10.0  # from a damaged CURRENT to the metric that says so
RECOVERY_SECONDS = 15.0  # from a good generation's publishing to its first answer
K = 5
QUESTIONS = ["river stone", "green cloud over the field", "wolf", "bread and salt at night"]


class Searches:
    """Asks without rest; every answer must be what the generation that it names gives."""

    def __init__(self, url: str, expected: dict[int, Expected]) -> None:
        self.answered: dict[int, int] = {}
        self.wrong: list[str] = []
        self._url, self._expected = url, expected
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    @contextmanager
    def running(self) -> Iterator[Searches]:
        self._thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            self._thread.join()
        assert not self.wrong, self.wrong[:3]

    def _run(self) -> None:
        with httpx.Client(timeout=60) as client:
            number = 0
            while not self._stop.is_set():
                number += 1
                question = number % len(QUESTIONS)
                body = {"pool": "keep", "query": QUESTIONS[question], "k": K}
                reply = client.post(f"{self._url}/v1/memories/search", json=body)
                problem = self._problem(reply, question)
                if problem:
                    self.wrong.append(problem)
                    return

    def _problem(self, reply: httpx.Response, question: int) -> str | None:
        if reply.status_code != 200:
            return reply.text
        found = reply.json()
        generation = found["generation"]
        self.answered[generation] = self.answered.get(generation, 0) + 1
        hits = tuple(Hit(item["id"], item["similarity"]) for item in found["memories"])
        return mixed(SearchAnswer(generation, hits), question, self._expected, K)


def metric(url: str, name: str) -> float:
    page = httpx.get(f"{url}/metrics", timeout=30).text
    return next(
        family.samples[0].value
        for family in text_string_to_metric_families(page)
        if family.name == name
    )


def wait(condition: Any, seconds: float, problem: str) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, problem
        time.sleep(0.02)
    return time.monotonic() - began


def half_copied(home: Path, number: int) -> None:
    """As `cp -r` leaves it when it is cut off: the manifest is there, the largest files not."""
    shutil.copytree(home / "000001", home / f"{number:06d}", copy_function=shutil.copy)
    renumber(home, number)
    for path in (home / f"{number:06d}").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (home / f"{number:06d}" / "index.faiss").unlink()


def flipped(home: Path, number: int) -> None:
    """Whole, but for one bit of the index."""
    shutil.copytree(home / "000001", home / f"{number:06d}", copy_function=shutil.copy)
    renumber(home, number)
    path = home / f"{number:06d}" / "index.faiss"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def unfinished(home: Path, number: int) -> None:
    """Everything but the manifest, which is written last."""
    shutil.copytree(home / "000001", home / f"{number:06d}", copy_function=shutil.copy)
    (home / f"{number:06d}" / "manifest.json").unlink()


def nothing(home: Path, number: int) -> None:
    """CURRENT names a generation that isn't there."""


def renumber(home: Path, number: int) -> None:
    path = home / f"{number:06d}" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["number"] = number
    path.write_text(json.dumps(manifest))


def test_the_old_generation_serves_on(tmp_path: Path) -> None:
    models, run = tmp_path / "models", tmp_path / "run"
    models.mkdir()
    tiny_encoder(models / "encoder", seed=1)
    other = tiny_encoder(models / "other", seed=2)
    config = loop_config(run, models)
    home = config.retriever_dir
    encoders = {
        1: Encoder.from_folder(models / "encoder", device="cpu"),
        5: Encoder.from_folder(other, device="cpu"),
    }
    with PoolStore.open(config.url) as store:
        store.create_pool("keep", threshold=0)
        store.create_pool("strict", threshold=100)
        texts = [(m.id, m.prompt, m.answer) for m in fill(store, "keep", 60)]
        publish_now(store, config, encoders[1])
        expected = {n: Expected.of(encoder, QUESTIONS, texts) for n, encoder in encoders.items()}
        with (
            gateway(run, models) as url,
            Load(url).running() as load,
            Searches(url, expected).running() as searches,
        ):
            noticed = []
            for number, damage in enumerate((half_copied, flipped, unfinished, nothing), start=2):
                load.more(5)
                damage(home, number)
                write_current(home, stage_current(home, number, pinned=False))
                noticed.append(
                    wait(
                        lambda: metric(url, "memshare_generation_error") == 1.0,
                        NOTICED_SECONDS,
                        f"{damage.__name__} was not noticed",
                    )
                )
                load.more(5)
                write_current(home, stage_current(home, 1, pinned=False))
                wait(
                    lambda: metric(url, "memshare_generation_error") == 0.0,
                    NOTICED_SECONDS,
                    "the old one is not current again",
                )
            (home / "CURRENT").write_text("garbage")
            wait(
                lambda: metric(url, "memshare_generation_error") == 1.0,
                NOTICED_SECONDS,
                "garbage in CURRENT was not noticed",
            )
            load.more(5)
            assert set(searches.answered) == {1}
            write_current(home, stage_current(home, 1, pinned=False))
            assert publish_now(store, config, encoders[5]) == 5
            recovery = wait(
                lambda: 5 in searches.answered, RECOVERY_SECONDS, "the good one never came"
            )
            load.more(5)
        before = {prompt: id for id, prompt, _ in texts}
        load.acknowledged |= before
        with gateway(run, models) as url:
            check(config.url, url, load)
    assert not load.refusals
    print(f"seconds to notice: {noticed}; {recovery:.1f} s to swap in the good one")
