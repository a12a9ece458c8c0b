"""Faults of the gateway's own machine under load: killed, its clock set."""

from __future__ import annotations

import datetime
import random
import socket
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa

from memshare.config import load_config
from memshare.pool.queue import PairQueue
from memshare.pool.schema import decisions, pending
from memshare.pool.store import PoolStore
from memshare.retrieval.encoder import Encoder
from memshare.sharing import prompt_hash
from tests.faults import Load, check, check_refusals, generation, publish_next
from tests.gateways import gateway, launch, stop, wait_ready
from tests.loop import loop_config_file
from tests.postgres import free_port
from tests.tiny import tiny_encoder

RESTART_SECONDS = 60.0  # from starting a killed gateway again to the first acknowledged write
DECIDED_SECONDS = 20.0  # from a restart under another clock to the last pair's decision


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def database(url: str) -> str:
    """Either database; in these tests ``url`` is the gateway's."""
    return url


def test_killed_under_load(tmp_path: Path, models: Path, database: str) -> None:
    rng = random.Random(4)
    port = free_port()
    config = loop_config_file(tmp_path, models, database_url=database)
    following = [tiny_encoder(models / f"next {seed}", seed=seed) for seed in (1, 2)]
    encoders = [Encoder.from_folder(folder, device="cpu") for folder in following]
    log = (tmp_path / "gateway.log").open("w")
    url = f"http://127.0.0.1:{port}"
    process = launch("serve/gateway.py", config, "--port", str(port), log=log)
    recoveries = []
    try:
        wait_ready(process, tmp_path)
        with Load(url, killed=True).running() as load:
            for encoder in encoders:
                load.more(rng.randrange(10, 60))
                number = publish_next(load_config(config), encoder)
                time.sleep(rng.random() * 0.2)
                process.kill()
                process.wait()
                began = time.monotonic()
                process = launch("serve/gateway.py", config, "--port", str(port), log=log)
                load.more()
                recoveries.append(time.monotonic() - began)
                # CURRENT's at once: neither the one before nor the configured encoder.
                assert generation(url) == number
            load.more(20)
        assert load.broken, "nobody noticed the kills"
        check(database, url, load)
        check_refusals(load)  # those of a gateway that was still starting
    finally:
        code, _ = stop(process)
        log.close()
    assert code == 0
    assert max(recoveries) < RESTART_SECONDS, f"seconds to recover: {recoveries}"
    print("seconds to recover:", recoveries)


CLOCK = '''"""Imported first by every Python here: its wall clock is off by what a file says."""
import datetime, os, time
_datetime = datetime.datetime
_real, _ns, _file = time.time, time.time_ns, os.environ["CLOCK_FILE"]
def _offset():
    with open(_file) as handle:
        return int(handle.read())
time.time = lambda: _real() + _offset()
time.time_ns = lambda: _ns() + _offset() * 1_000_000_000
class Kind(type):
    def __instancecheck__(cls, value):
        return isinstance(value, _datetime)
class Jumping(_datetime, metaclass=Kind):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(seconds=_offset())
datetime.datetime = Jumping
'''


class Clock:
    """The wall clock of the programs that are started with its environment."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(CLOCK)
        self._file = folder / "offset"
        self.set(0)
        self.environment = {"PYTHONPATH": str(folder), "CLOCK_FILE": str(self._file)}

    def set(self, seconds: int) -> None:
        """Be off by ``seconds`` from now on."""
        staged = self._file.with_suffix(".new")
        staged.write_text(str(seconds))
        staged.rename(self._file)


def test_the_clock_jumps_under_load(
    tmp_path: Path, models: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writes stay whole and in order, and searches find them, whatever the clock says."""
    clock = Clock(tmp_path / "clock")
    for name, value in clock.environment.items():
        monkeypatch.setenv(name, value)
    with gateway(tmp_path / "run", models, database_url=database) as url:
        assert abs(created_at(url, "now") - time.time()) < 60
        with Load(url).running() as load:
            for jump in (7200, -7200, 86_400 * 400, 0):
                load.more(15)
                clock.set(jump)
                load.more(15)
            clock.set(-3600)
        assert created_at(url, "an hour ago") < time.time() - 3000, "the clock never jumped"
        assert not load.refusals and load.slowest < 10.0, load.slowest
        for prompt in ("now", "an hour ago"):
            load.acknowledged[prompt] = write(url, prompt)
        check(database, url, load)


def write(url: str, prompt: str) -> str:
    item = {"pool": "keep", "prompt": prompt, "answer": "yes"}
    reply = httpx.post(f"{url}/v1/memories", json={"items": [item]}, timeout=30)
    return str(reply.raise_for_status().json()["results"][0]["id"])


def created_at(url: str, prompt: str) -> float:
    """When a memory written now says it was made, in seconds since 1970."""
    memory = httpx.get(f"{url}/v1/memories/{write(url, prompt)}", timeout=30).json()
    return datetime.datetime.fromisoformat(memory["created_at"]).timestamp()


def test_claims_of_a_killed_gateway_outlive_no_clock(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed with pairs claimed, started an hour earlier: each is decided soon, and once."""
    clock = Clock(tmp_path / "clock")
    for name, value in clock.environment.items():
        monkeypatch.setenv(name, value)
    mute = socket.create_server(("127.0.0.1", 0))  # takes connections, and answers none
    scorer = {
        "backend": "openai", "model": "mute", "retries": 0, "timeout_seconds": 600,
        "url": f"http://127.0.0.1:{mute.getsockname()[1]}",
    }  # fmt: skip
    section = {"score_writes": True, "scoring_lease_seconds": 3.0}
    run = tmp_path / "run"
    config = loop_config_file(
        run, models, gateway=section, scorer_llm=scorer, scorer={"kind": "rubric"}
    )
    process = launch("serve/gateway.py", config, "--port", "0")
    url = wait_ready(process, run)
    prompts = [f"question {number}" for number in range(8)]
    with PoolStore.open(f"sqlite:///{run}/pool.db") as store:
        queue = PairQueue(store.database)
        items = [{"pool": "keep", "prompt": prompt, "answer": "yes"} for prompt in prompts]
        reply = httpx.post(f"{url}/v1/memories", json={"items": items}, timeout=30)
        assert reply.status_code == 202, reply.text
        while not claimed(store):
            time.sleep(0.02)
        process.kill()
        process.communicate()
        mute.close()
        clock.set(-3600)
        with gateway(run, models, gateway=section) as url:
            started = time.monotonic()
            while queue.count():
                assert time.monotonic() - started < DECIDED_SECONDS, "pairs are never decided"
                time.sleep(0.05)
            print(f"{time.monotonic() - started:.1f} s until the last decision")
        with store.database.read() as connection:
            counts = Counter(connection.scalars(sa.select(decisions.c.prompt_hash)))
        stored = Counter(memory.prompt for memory in store.iter("keep"))
    assert set(counts.values()) == set(stored.values()) == {1}
    assert set(counts) == {prompt_hash(prompt) for prompt in prompts}


def claimed(store: PoolStore) -> int:
    """Pairs that somebody grades."""
    with store.database.read() as connection:
        claims = sa.select(sa.func.count()).where(pending.c.claim.is_not(None))
        return int(connection.execute(claims).scalar_one())
