"""What SQLite needs beyond portable SQL: a durable file, and writers that wait for each other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from memshare.files import NETWORK_FILE_SYSTEMS, file_system, write_ahead
from memshare.pool.errors import PoolError

BUSY_SECONDS = 30.0
# Kept open, enough for a gateway's threads by default: opening one takes several queries.
_CONNECTIONS = 50


class SQLite:
    """A `Backend` over one file. Its writers are alone, in this process and in all others.

    A writer takes the write lock when it begins (``BEGIN IMMEDIATE``) and waits up to
    `BUSY_SECONDS` for it: a transaction that read first and wrote later could not wait, it would
    fail with "database is locked".
    """

    reading: Mapping[str, Any] = {}

    def __init__(self, url: sa.URL, must_exist: bool, serialise: Callable[[Any], str]) -> None:
        """Make the file's folder; raises `PoolError` without one, or without a file to be there."""
        if url.database in (None, "", ":memory:"):
            raise PoolError(f"{url}: a pool needs a file: sqlite:///PATH")
        path = Path(str(url.database))
        if must_exist and not path.exists():
            raise PoolError(f"{path}: no pool database there; create a pool first")
        if (kind := file_system(path)) in NETWORK_FILE_SYSTEMS:
            raise PoolError(
                f"{path}: is on a network file system ({kind}), where SQLite loses data; "
                "set database_url to PostgreSQL, or to a file on a local disk"
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PoolError(f"{url}: its folder can't be made: {error}") from error
        # Threads of this process hand the writer's place on directly; SQLite's own wait sleeps.
        self.writers: AbstractContextManager[Any] = threading.Lock()
        self.engine = sa.create_engine(
            url,
            json_serializer=serialise,
            pool_size=_CONNECTIONS,
            connect_args={"timeout": BUSY_SECONDS},
        )
        event.listen(self.engine, "connect", _prepare)
        event.listen(self.engine, "begin", _begin)

    def lock(self, connection: sa.Connection, number: int) -> None:
        """Nothing to do."""

    def begin_migration(self, connection: sa.Connection) -> None:
        """Nothing to do."""

    def announce(self, connection: sa.Connection, pool: str) -> None:
        """Nobody can be told: who reads the file must poll."""

    def mark_erased(self, connection: sa.Connection) -> None:
        """Make the file's ``user_version`` odd: its log holds text that is to be scrubbed.

        The number only grows, so that it also tells of an erasure during a scrub.
        """
        number = _user_version(connection)
        connection.exec_driver_sql(f"PRAGMA user_version = {number + 1 + number % 2}")

    def scrub(self) -> bool:
        """Empty the write-ahead log, where text stays readable after its page was overwritten.

        Only if something was erased since that was last done: for a moment nobody may read or
        write.
        """
        with self.engine.connect() as connection, connection.begin():
            number = _user_version(connection)
        if number % 2 == 0:
            return True
        with self.writers, self.engine.connect() as connection:
            driver: Any = connection.connection.dbapi_connection
            driver.execute("PRAGMA busy_timeout = 0")  # or it would wait for readers to end
            try:
                busy = driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            except driver.Error:  # a full disk, say: what was to be erased is erased, not scrubbed
                return False
            finally:
                driver.execute(f"PRAGMA busy_timeout = {round(1000 * BUSY_SECONDS)}")
            if busy:
                return False
            connection = connection.execution_options(memshare_write=True)
            # Where that can't be put on record, it is done once more, and the deletion stands.
            with suppress(OperationalError), connection.begin():
                if _user_version(connection) == number:
                    connection.exec_driver_sql(f"PRAGMA user_version = {number + 1}")
        return True

    def listening(self, wake: Callable[[], None]) -> AbstractContextManager[None]:
        """``wake`` is never called."""
        return nullcontext()


def _prepare(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver begins nothing itself; _begin does
    write_ahead(connection, BUSY_SECONDS)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA secure_delete = ON")  # deleted text is overwritten, not unlinked


def _user_version(connection: sa.Connection) -> int:
    """A number in the file's header that SQLite leaves to its users."""
    return int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())


def _begin(connection: sa.Connection) -> None:
    write = connection.get_execution_options().get("memshare_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
