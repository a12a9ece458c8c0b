"""What only PostgreSQL does: settings of the session, patience, and telling of changes."""

import threading
import time
from collections.abc import Callable, Iterator

import psycopg
import pytest
import sqlalchemy as sa

from memshare.pool import decisions
from memshare.pool import postgres as room
from memshare.pool.errors import PoolError, PoolUnavailable
from memshare.pool.rows import need_pool
from memshare.pool.store import PoolStore
from memshare.records import NewMemory
from tests.postgres import PostgresServer
from tests.proxy import Proxy

pytestmark = pytest.mark.server


@pytest.fixture
def name(postgres: PostgresServer) -> str:
    return postgres.create()


@pytest.fixture
def store(postgres: PostgresServer, name: str) -> Iterator[PoolStore]:
    with PoolStore.open(postgres.url(name)) as opened:
        opened.create_pool("main")
        yield opened


def test_a_write_is_durable_whatever_the_database_prefers(
    postgres: PostgresServer, name: str, store: PoolStore
) -> None:
    with psycopg.connect(postgres.url(name), autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {name} SET synchronous_commit = off".encode())
    with PoolStore(postgres.url(name)) as fresh, fresh._db.write() as connection:
        assert connection.exec_driver_sql("SHOW synchronous_commit").scalar() == "on"
        assert connection.exec_driver_sql("SHOW fsync").scalar() == "on"
    with psycopg.connect(postgres.url(name), autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {name} SET synchronous_commit = remote_apply".encode())
    with PoolStore(postgres.url(name)) as fresh, fresh._db.write() as connection:
        assert connection.exec_driver_sql("SHOW synchronous_commit").scalar() == "remote_apply"


def test_a_database_that_can_not_hold_every_text_is_refused(postgres: PostgresServer) -> None:
    with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:
        connection.execute("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    with pytest.raises(PoolError, match=r"LATIN1.*UTF8"):
        PoolStore.open(postgres.url("latin"))


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
def test_every_common_form_of_the_url_works(
    postgres: PostgresServer, name: str, scheme: str
) -> None:
    with PoolStore.open(postgres.url(name).replace("postgresql", scheme)) as store:
        assert store.pools() == []


def test_writers_of_different_pools_do_not_wait_for_each_other(store: PoolStore) -> None:
    store.create_pool("other")
    with store._db.write() as connection:
        need_pool(connection, "main", lock=True)
        store.append([NewMemory("other", "p", "a")])
        with store.database.write() as beside:
            decisions.record(beside, "main", "below threshold", "h", 1, None, None)


def test_a_vanished_writer_frees_its_pool(
    postgres: PostgresServer, name: str, store: PoolStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = f"idle_in_transaction_session_timeout = '{room.ABANDONED_SECONDS}s'"
    assert limit in room._SESSION
    monkeypatch.setattr(room, "_SESSION", room._SESSION.replace(limit, limit[:-4] + "300ms'"))
    with PoolStore(postgres.url(name)) as vanished:
        connection = vanished._db.engine.connect()
        need_pool(connection, "main", lock=True)  # and never a word again
        began = time.monotonic()
        store.append([NewMemory("main", "p", "a")])
        assert 0.1 < time.monotonic() - began < room.LOCK_SECONDS
        connection.invalidate()
        with pytest.raises(PoolUnavailable), vanished.database.write() as late:  # it was paused
            need_pool(late, "main", lock=True)
            time.sleep(0.5)
            need_pool(late, "main")


def test_a_server_that_is_a_copy_just_now_may_take_over(store: PoolStore) -> None:
    refusal = psycopg.errors.FeatureNotSupported(
        "cannot set transaction read-write mode during recovery"
    )
    with pytest.raises(PoolUnavailable, match="recovery"), store.database.write():
        raise sa.exc.NotSupportedError("BEGIN READ WRITE", {}, refusal)


def test_a_server_that_does_not_answer_is_given_up(
    postgres: PostgresServer, name: str, store: PoolStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room.BoundedConnection, "patience", 0.5)
    with (
        Proxy(postgres.port) as proxy,
        PoolStore(postgres.url(name, proxy.port)) as cut,
    ):
        cut.append([NewMemory("main", "before", "a")])
        proxy.cut()
        began = time.monotonic()
        with pytest.raises(PoolError, match=r"no answer within 0.5 s|timeout"):
            cut.append([NewMemory("main", "meanwhile", "a")])
        assert time.monotonic() - began < 0.5 + room.CONNECT_SECONDS + 1
        proxy.mend()
        cut.append([NewMemory("main", "after", "a")])
    assert [m.prompt for m in store.iter("main")] == ["before", "after"]


def test_listeners_are_told_of_every_kind_of_change(
    postgres: PostgresServer, name: str, store: PoolStore
) -> None:
    woken = threading.Event()

    def told(change: Callable[[], object]) -> None:
        woken.clear()
        assert change()
        assert woken.wait(1), "nobody told"

    with PoolStore.open(postgres.url(name)) as other, other.listening(woken.set):
        assert woken.wait(5), "who begins to listen looks at once"
        told(lambda: store.append([NewMemory("main", "p", "a")]))
        (memory,) = store.iter("main")
        told(lambda: store.hold(memory.id))
        told(lambda: store.release(memory.id))
        woken.clear()
        assert store.append([NewMemory("main", "p", "a")])[0].status == "duplicate"
        assert not woken.wait(0.5)
        told(lambda: store.delete(memory.id))


def test_a_listener_that_lost_its_connection_finds_back(
    postgres: PostgresServer, name: str, store: PoolStore, capfd: pytest.CaptureFixture[str]
) -> None:
    woken = threading.Event()
    with PoolStore.open(postgres.url(name)) as other, other.listening(woken.set):
        assert woken.wait(5)
        with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:
            woken.clear()
            ended = connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = %s AND query LIKE 'LISTEN%%'",
                [name],
            ).fetchall()
        assert ended == [(True,)]
        assert woken.wait(5), "what came meanwhile must be looked for"
        woken.clear()
        store.append([NewMemory("main", "p", "a")])
        assert woken.wait(1)
    err = capfd.readouterr().err
    assert err.count("only polling") == 1 and "told of the pools' changes again" in err
