"""The database's disk is full, under load: nothing acknowledged is lost, and service returns."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import pytest

from memshare.pool.store import PoolStore
from memshare.records import NewMemory
from tests.disks import fill_up, small_disk
from tests.faults import Load, check, check_refusals
from tests.gateways import gateway
from tests.loop import loop_config_file
from tests.postgres import PostgresServer
from tests.training_runs import ENV, ROOT

ROOM_SECONDS = 5.0  # from room on the disk to the first acknowledged write
# The same where PostgreSQL stopped meanwhile, counted from its return.
RECOVERY_SECONDS = 15.0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def disk() -> Iterator[Path]:
    """One that PostgreSQL's user can get at, which pytest's folders are not."""
    with tempfile.TemporaryDirectory(prefix="memshare-disk-") as name:
        Path(name).chmod(0o755)
        with small_disk(Path(name) / "disk", "40m") as disk:
            yield disk


def search(url: str) -> int:
    """How many memories a search finds."""
    body = {"pool": "keep", "query": "writer", "k": 20}
    return len(httpx.post(f"{url}/v1/memories/search", json=body, timeout=30).json()["memories"])


def full_under_load(url: str, disk: Path) -> tuple[Load, float]:
    """What was written before, while and after the disk was full; and seconds to recover."""
    with Load(url).running() as load:
        load.more(20)
        ballast = fill_up(disk)
        load.refused()
        assert search(url) == 20  # reading goes on
        ballast.unlink()
        recovery = load.more()
        load.more(20)
    check_refusals(load)
    return load, recovery


def test_sqlite(tmp_path: Path, models: Path) -> None:
    with ExitStack() as stack:
        disk = stack.enter_context(small_disk(tmp_path / "disk", "8m"))
        database = f"sqlite:///{disk}/pool.db"
        url = stack.enter_context(gateway(tmp_path / "run", models, database_url=database))
        load, recovery = full_under_load(url, disk)
        check(database, url, load)
    assert recovery < ROOM_SECONDS, f"{recovery:.1f} s to recover"
    print(f"{recovery:.1f} s to recover")


@pytest.mark.parametrize("program", ["train/mine.py", "serve/gateway.py"])
def test_a_run_folder_without_room_ends_a_program_with_one_line(
    tmp_path: Path, models: Path, program: str
) -> None:
    """Its lock is there already, and the database elsewhere."""
    database = f"sqlite:///{tmp_path}/pool.db"
    with PoolStore.open(database) as store:
        store.create_pool("keep")
        store.append([NewMemory("keep", f"how is {t} made", t) for t in ("bread", "tin", "ice")])
    with small_disk(tmp_path / "disk", "4m") as disk:
        config = loop_config_file(disk / "run", models, database_url=database)
        for role in ("mining", "gateway"):
            (disk / "run" / f"{role}.lock").write_text("1 on another node")
        fill_up(disk)
        command = [sys.executable, str(ROOT / program), "--config", str(config)]
        command += ["--port", "0"] if program == "serve/gateway.py" else []
        done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr and "No space left" in done.stderr.splitlines()[-1]


@pytest.mark.server
def test_tables_of_postgresql(disk: Path, tmp_path: Path, models: Path) -> None:
    """The server goes on, and refuses what it has no room for."""
    folder = disk / "tables"
    folder.mkdir()
    # One of its own: with the disk gone afterwards, a server can make no other database.
    with ExitStack() as stack:
        server = stack.enter_context(closing(PostgresServer()))
        database = server.url(server.create(folder))
        url = stack.enter_context(gateway(tmp_path / "run", models, database_url=database))
        load, recovery = full_under_load(url, disk)
        assert "No space left" in (tmp_path / "run" / "gateway.log").read_text()
        check(database, url, load)
    assert recovery < ROOM_SECONDS, f"{recovery:.1f} s to recover"
    print(f"{recovery:.1f} s to recover")


@pytest.mark.server
def test_log_of_postgresql(disk: Path, tmp_path: Path, models: Path) -> None:
    """The server stops, as it must not acknowledge what it can't log, and is started again."""
    wal = disk / "wal"
    wal.mkdir()
    with closing(PostgresServer(wal)) as server:
        server.run("SELECT pg_create_physical_replication_slot('nobody', true)")  # keeps all of it
        database = server.url(server.create())
        with gateway(tmp_path / "run", models, database_url=database) as url:
            with Load(url).running() as load:
                load.more(20)
                ballast = fill_up(disk)
                load.refused()
                assert httpx.get(f"{url}/healthz", timeout=5).status_code == 200
                load.until(lambda: not server.alive, 60, "PostgreSQL goes on without a log")
                assert "No space left" in server.log.read_text()
                ballast.unlink()
                server.start()
                recovery = load.more()
                load.more(20)
            check_refusals(load)
            check(database, url, load)
    assert recovery < RECOVERY_SECONDS, f"{recovery:.1f} s to recover"
    print(f"{recovery:.1f} s to recover")
