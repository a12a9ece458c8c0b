"""Every answer that was given is decided once: gateways on one database, and kill -9 among them."""

from __future__ import annotations

import random
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa

from memshare.pool.queue import PairQueue
from memshare.pool.schema import decisions
from memshare.pool.store import PoolStore
from memshare.sharing import prompt_hash
from tests.gateways import gateway, launch, stop, wait_ready
from tests.loop import loop_config_file

LEASE = 2.0
AWAY = {"backend": "vllm", "url": "http://127.0.0.1:9", "retries": 0}  # nobody listens there


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def start(run_dir: Path, models: Path, database: str) -> tuple[subprocess.Popen[str], str]:
    section = {"score_writes": True, "scoring_lease_seconds": LEASE, "scoring_workers": 2}
    config = loop_config_file(run_dir, models, gateway=section, database_url=database)
    (run_dir / "gateway.json").unlink(missing_ok=True)
    process = launch("serve/gateway.py", config, "--port", "0")
    return process, wait_ready(process, run_dir)


def decided(store: PoolStore) -> Counter[str]:
    """Decisions by the prompt that they are about."""
    with store.database.read() as connection:
        rows = connection.execute(sa.select(decisions.c.prompt_hash)).scalars()
        return Counter(rows)


class Writers:
    """Threads that send pairs to be graded until stopped, and what was taken of them."""

    def __init__(self, urls: dict[str, str]) -> None:
        self.urls = urls  # by name; changed while they run
        self.taken: list[str] = []
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(name,)) for name in urls]
        for thread in self._threads:
            thread.start()

    def _run(self, name: str) -> None:
        number = 0
        with httpx.Client(timeout=30) as client:
            while not self._stopping.is_set():
                number += 1
                prompt = f"question {number} to gateway {name}"
                body = {"items": [{"pool": "keep", "prompt": prompt, "answer": "yes"}]}
                try:
                    reply = client.post(f"{self.urls[name]}/v1/memories", json=body)
                except httpx.TransportError:  # killed: this pair was never acknowledged
                    time.sleep(0.05)
                    continue
                if reply.status_code == 202:
                    self.taken.append(prompt)
                time.sleep(0.01)

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()


def test_two_gateways_killed_at_random_decide_each_pair_once(
    tmp_path: Path, models: Path, url: str
) -> None:
    rng = random.Random(9)
    running = {name: start(tmp_path / name, models, url) for name in ("a", "b")}
    writers = Writers({name: own for name, (_, own) in running.items()})
    try:
        for victim in ("a", "b"):
            time.sleep(1 + rng.random())
            process, _ = running[victim]
            process.kill()
            process.communicate()
            running[victim] = start(tmp_path / victim, models, url)
            writers.urls[victim] = running[victim][1]
        time.sleep(0.5)
    finally:
        writers.stop()
    with PoolStore.open(url) as store:
        queue = PairQueue(store.database)
        began = time.monotonic()
        while queue.count():
            assert time.monotonic() - began < 60, f"{queue.count()} pairs are never decided"
            time.sleep(0.1)
        for process, _ in running.values():
            code, log = stop(process)
            assert code == 0 and "Traceback" not in log, log
        counts = decided(store)
        stored = Counter(memory.prompt for memory in store.iter("keep"))
    assert len(writers.taken) > 50
    assert set(counts.values()) == set(stored.values()) == {1}  # nothing twice
    assert all(counts[prompt_hash(prompt)] == 1 for prompt in writers.taken)  # nothing lost


def test_an_answer_outlives_its_gateway_until_a_scorer_is_there(
    tmp_path: Path, models: Path
) -> None:
    """The answer went out, nothing graded it, and the process was killed in between."""
    section = {"scoring_lease_seconds": LEASE}
    config = loop_config_file(tmp_path, models, scorer_llm=AWAY, gateway=section)
    process = launch("serve/gateway.py", config, "--port", "0")
    url = wait_ready(process, tmp_path)
    for seed in range(40):  # a random model rarely ends by itself
        body = {
            "messages": [{"role": "user", "content": f"question {seed}"}],
            "seed": seed, "temperature": 1.0, "stop": list("etaoinrs "),
        }  # fmt: skip
        reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
        choice = reply["choices"][0]
        if choice["finish_reason"] == "stop" and choice["message"]["content"].strip():
            break
    assert reply["memshare"]["write"] == "pending"
    process.kill()
    process.communicate()
    with gateway(tmp_path, models, gateway=section) as url:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            page = httpx.get(f"{url}/v1/memories?pool=keep").json()["memories"]
            if page:
                break
            time.sleep(0.1)
    (memory,) = page
    assert memory["prompt"] == f"question {seed}"
    assert memory["answer"] == choice["message"]["content"].strip()
    assert (memory["agent"], memory["model"]) == ("local", reply["model"])
    with PoolStore.open(f"sqlite:///{tmp_path}/pool.db") as store:
        assert decided(store)[prompt_hash(memory["prompt"])] == 1
