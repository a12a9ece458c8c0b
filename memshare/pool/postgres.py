"""What PostgreSQL needs beyond portable SQL: session settings, patience, and word of changes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import psycopg
import sqlalchemy as sa
from psycopg.abc import PQGen
from psycopg.errors import _WaitTimeout as WaitTimeout
from sqlalchemy import event
from sqlalchemy.exc import InvalidatePoolError, SQLAlchemyError

from memshare.pool.errors import PoolError
from memshare.progress import log

CONNECT_SECONDS = 5
PING_SECONDS = 2.0  # for a kept connection to show that its server is there
LOCK_SECONDS = 8  # waiting for another writer of the same pool
ANSWER_SECONDS = 10.0  # then the server is taken for gone; more than LOCK_SECONDS
ABANDONED_SECONDS = 15  # after which the server ends a transaction whose client says nothing
KEPT_CONNECTIONS, MORE_CONNECTIONS = 16, 8
WRITERS = 12  # at once in a process: fewer than connections, so that reads always find one
CHANNEL = "memshare_changes"
_LOCK_SPACE = 0x6D656D73  # "mems": keeps our advisory locks apart from other programs'
_SCHEMA_LOCK = 1
_HEARD_SECONDS = 0.2  # between two looks at whether to stop listening
_QUIET_SECONDS = 10.0  # without a word, after which a listener makes sure that it is connected
_RETRY_SECONDS = 1.0

T = TypeVar("T")

# `off` would acknowledge writes that a crash loses; what an administrator made stricter stays. The
# rest frees the locks of a client that vanished, for which others wait.
_SESSION = f"""
    SELECT set_config('synchronous_commit', 'on', false)
      WHERE current_setting('synchronous_commit') = 'off';
    SET lock_timeout = '{LOCK_SECONDS}s';
    SET idle_in_transaction_session_timeout = '{ABANDONED_SECONDS}s';
    SET tcp_keepalives_idle = 10;
    SET tcp_keepalives_interval = 5;
    SET tcp_keepalives_count = 3;
"""


class BoundedConnection(psycopg.Connection[Any]):
    """A connection that gives up on a server that doesn't answer.

    Keepalives notice a network that drops packets; only a clock notices a stalled server, or a
    proxy whose other side is gone. ``patience`` is in seconds, None waits for ever.
    """

    patience: float | None = ANSWER_SECONDS

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        """As psycopg's; without a ``timeout`` of its own, `patience` ends it and closes this."""
        if timeout is not None:
            return super().wait(gen, interval, timeout)
        try:
            return super().wait(gen, interval, self.patience)
        except WaitTimeout:
            self.pgconn.finish()  # it still expects that answer, so it is of no more use
            raise psycopg.OperationalError(
                f"no answer within {self.patience:g} seconds; connection closed"
            ) from None


class PostgreSQL:
    """A `Backend` on a server. Writers of different pools run side by side."""

    reading: Mapping[str, Any] = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}

    def __init__(self, url: sa.URL, serialise: Callable[[Any], str]) -> None:
        """Connect nothing yet."""
        self.writers: AbstractContextManager[Any] = threading.BoundedSemaphore(WRITERS)
        self.engine = sa.create_engine(
            url.set(drivername="postgresql+psycopg"),
            json_serializer=serialise,
            isolation_level="READ COMMITTED",  # a writer's reads follow its wait for the pool
            pool_size=KEPT_CONNECTIONS,
            max_overflow=MORE_CONNECTIONS,
            pool_timeout=ANSWER_SECONDS,
            connect_args={
                "connect_timeout": CONNECT_SECONDS,
                "application_name": "memshare",
                "client_encoding": "utf8",
            },
        )
        event.listen(self.engine, "do_connect", _connect)
        event.listen(self.engine, "connect", _prepare)
        event.listen(self.engine, "checkout", _ping)

    def lock(self, connection: sa.Connection, number: int) -> None:
        """An advisory lock of the transaction."""
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK_SPACE, number)))

    def begin_migration(self, connection: sa.Connection) -> None:
        """Lift every limit, on a connection that is closed afterwards, and lock the schema."""
        _driver(connection).patience = None
        connection.detach()
        connection.exec_driver_sql("SET LOCAL lock_timeout = 0")
        self.lock(connection, _SCHEMA_LOCK)

    def announce(self, connection: sa.Connection, pool: str) -> None:
        """Notifications are part of the transaction: sent after the commit, in its order."""
        connection.execute(sa.select(sa.func.pg_notify(CHANNEL, pool)))

    def mark_erased(self, connection: sa.Connection) -> None:
        """Nothing to do: see `scrub`."""

    def scrub(self) -> bool:
        """Nothing to do: (auto)vacuum and the recycling of the log do it in their time."""
        return True

    @contextmanager
    def listening(self, wake: Callable[[], None]) -> Iterator[None]:
        """Call ``wake`` whenever any process, this one too, has changed a pool.

        A lost connection is made again in the background, and ``wake`` called then, since changes
        may have been missed. Who listens must poll as well; this only makes it sooner.
        """
        stop = threading.Event()
        thread = threading.Thread(
            target=_listen, args=(self.engine, wake, stop), name="pool-listener", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _connect(_dialect: Any, _record: Any, args: Any, options: dict[str, Any]) -> BoundedConnection:
    return BoundedConnection.connect(*args, **options)


def _prepare(connection: BoundedConnection, _record: Any) -> None:
    encoding = connection.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        raise PoolError(
            f"the database is in {encoding}, which can't hold every text; create it with "
            "ENCODING 'UTF8' TEMPLATE template0"
        )
    connection.autocommit = True
    connection.execute(_SESSION)
    connection.autocommit = False


def _ping(connection: BoundedConnection, _record: Any, _proxy: Any) -> None:
    """Make sure of a kept connection, so that a restarted server costs no request.

    As SQLAlchemy's ``pool_pre_ping``, but with less patience: one that is gone, or doesn't answer,
    must cost a request a connection attempt and no more. All others are given up with it.
    """
    patience = connection.patience
    connection.patience = PING_SECONDS if patience is None else min(PING_SECONDS, patience)
    try:
        connection.autocommit = True
        connection.execute("SELECT 1")
        connection.autocommit = False
    except psycopg.Error as error:
        raise InvalidatePoolError(f"a kept connection is gone: {error}") from error
    connection.patience = patience


def _driver(connection: sa.Connection) -> BoundedConnection:
    driver = connection.connection.dbapi_connection
    assert isinstance(driver, BoundedConnection)
    return driver


def _listen(engine: sa.Engine, wake: Callable[[], None], stop: threading.Event) -> None:
    failed = False
    while not stop.is_set():
        try:
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                driver = _driver(connection)
                try:
                    driver.execute(f"LISTEN {CHANNEL}")
                    if failed:
                        log("told of the pools' changes again")
                    failed = False
                    _pass_on(driver, wake, stop)
                finally:
                    connection.invalidate()  # closed: it must not go back to the pool listening
        except (SQLAlchemyError, psycopg.Error, PoolError) as error:
            if not failed:
                log(f"not told of the pools' changes, only polling for them: {error}")
            failed = True
            stop.wait(_RETRY_SECONDS)


def _pass_on(driver: BoundedConnection, wake: Callable[[], None], stop: threading.Event) -> None:
    wake()  # for what was written before we listened
    quiet = 0.0
    while not stop.is_set():
        if list(driver.notifies(timeout=_HEARD_SECONDS, stop_after=1)):
            wake()
            quiet = 0.0
        elif (quiet := quiet + _HEARD_SECONDS) >= _QUIET_SECONDS:
            driver.execute("SELECT 1")
            quiet = 0.0
