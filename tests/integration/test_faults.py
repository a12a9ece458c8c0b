"""Faults of the database under load: what was acknowledged is kept, and service returns.

Other faults: test_faults_disk.py (of its disk), test_faults_gateway.py, test_faults_generations.py,
test_faults_llm.py and test_faults_trainer.py.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from memshare.gateway.access import TRUST_SECONDS
from memshare.pool.keys import KeyRing
from memshare.pool.store import PoolStore
from memshare.retrieval.encoder import Encoder
from tests.faults import Load, check, check_refusals, generation, publish_next
from tests.gateways import gateway
from tests.loop import loop_config
from tests.postgres import PostgresServer
from tests.proxy import Proxy
from tests.retrieving import until
from tests.tiny import tiny_encoder

pytestmark = pytest.mark.server
READ_SECONDS = 10.0  # a read is refused by then while no database answers
SCRAPE_SECONDS = 10.0  # Prometheus' own default patience
RECOVERY_SECONDS = 15.0  # from the database's return to the first write that is acknowledged


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """One of its own: it is killed here."""
    own = PostgresServer()
    yield own
    own.close()


def test_postgresql_killed_under_load(server: PostgresServer, tmp_path: Path, models: Path) -> None:
    rng = random.Random(0)
    database = server.url(server.create())
    recoveries = []
    config = loop_config(tmp_path, models, database_url=database)
    following = [tiny_encoder(models / f"next {seed}", seed=seed) for seed in (1, 2, 3)]
    with gateway(tmp_path, models, database_url=database) as url, Load(url).running() as load:
        for folder in following:
            load.more(rng.randrange(10, 40))
            number = publish_next(config, Encoder.from_folder(folder, device="cpu"))
            time.sleep(rng.random() * 0.3)
            server.kill()
            load.refused()
            assert httpx.get(f"{url}/healthz", timeout=5).status_code == 200
            server.start()
            recoveries.append(load.more())
            # It was loading, or about to; it must come to it, and to no other.
            until(lambda: generation(url) == number, RECOVERY_SECONDS)  # noqa: B023
        load.more(20)
        assert generation(url) == number
    assert max(recoveries) < RECOVERY_SECONDS, f"seconds to recover: {recoveries}"
    print("seconds to recover:", recoveries)
    check_refusals(load)
    with gateway(tmp_path, models, database_url=database) as url:
        check(database, url, load)
        assert generation(url) == number


def test_figures_are_shown_while_the_database_is_away(
    server: PostgresServer, tmp_path: Path, models: Path
) -> None:
    """To a key that was good when the database was last asked; all else is refused, and says so."""
    database = server.url(server.create())
    with PoolStore.open(database) as store:
        ring = KeyRing(store.database)
        (_, root), (_, late) = (ring.create(name, {"*": ["admin"]}) for name in ("root", "late"))
        _, reader = ring.create("reader", {"keep": ["read"]})
    made_up = "ms-" + "x" * 43

    def scrape(url: str, key: str, path: str = "/metrics") -> httpx.Response:
        return httpx.get(url + path, headers={"Authorization": f"Bearer {key}"}, timeout=30)

    section = {"keys": "required"}
    with (
        Proxy(server.port) as proxy,
        gateway(
            tmp_path, models, gateway=section,
            database_url=server.url(database.rsplit("/", 1)[1], proxy.port),
        ) as url,
    ):  # fmt: skip
        assert "memshare_database_error 0.0" in scrape(url, root).text
        assert scrape(url, reader).status_code == 403
        for fault, mended in ((proxy.cut, proxy.mend), (server.kill, server.start)):
            fault()
            time.sleep(TRUST_SECONDS + 0.1)
            began = time.monotonic()
            told = scrape(url, root)
            waited = time.monotonic() - began
            print(f"figures after {waited:.1f} s")
            assert told.status_code == 200 and "memshare_database_error 1.0" in told.text
            assert "memshare_searches_total" in told.text
            assert waited < SCRAPE_SECONDS, f"Prometheus would not wait {waited:.1f} s"
            assert scrape(url, reader).status_code == 403
            for key, path in ((late, "/metrics"), (made_up, "/metrics"), (root, "/v1/models")):
                refused = scrape(url, key, path)
                assert refused.status_code == 503, (path, refused.text)
                assert int(refused.headers["Retry-After"]) > 0
                assert refused.json()["error"]["code"] == "pool_unavailable"
            mended()
            until(lambda: "memshare_database_error 0.0" in scrape(url, root).text, RECOVERY_SECONDS)
        assert scrape(url, made_up).status_code == 401


def test_network_to_the_database_cut(
    postgres: PostgresServer, tmp_path: Path, models: Path
) -> None:
    name = postgres.create()
    with (
        Proxy(postgres.port) as proxy,
        gateway(tmp_path, models, database_url=postgres.url(name, proxy.port)) as url,
    ):
        with Load(url).running() as load:
            load.more(20)
            proxy.cut()
            began = time.monotonic()
            reply = httpx.get(f"{url}/v1/memories?pool=keep", timeout=60)
            waited = time.monotonic() - began
            assert reply.status_code == 503 and reply.headers["Retry-After"], reply.text
            assert waited < READ_SECONDS, f"a read was refused after {waited:.1f} s"
            load.refused()
            proxy.mend()
            recovery = load.more()
            load.more(20)
        check_refusals(load)
        check(postgres.url(name), url, load)
    assert recovery < RECOVERY_SECONDS, f"{recovery:.1f} s to recover"
    print(f"a read was refused after {waited:.1f} s; {recovery:.1f} s to recover")
