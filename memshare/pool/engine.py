"""Opening the pool's database: which kind it is, transactions and migrations."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import sqlalchemy as sa
from sqlalchemy.exc import (
    ArgumentError,
    InterfaceError,
    OperationalError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as NoConnection

from memshare.pool.errors import PoolError, PoolUnavailable
from memshare.pool.schema import HEAD

MIGRATIONS = Path(__file__).parent / "migrations"
_PASSING = (InterfaceError, OperationalError, NoConnection)  # of the server, not of the statement
_STANDBY = "0A000"  # what PostgreSQL says to a writer while it is another server's copy
POOLS_LOCK, IDS_LOCK, USES_LOCK = 2, 3, 4  # see `Backend.lock`


class Backend(Protocol):
    """What differs between the databases; all SQL but this is one code path.

    ``writers`` admits this process's writers.
    """

    engine: sa.Engine
    writers: AbstractContextManager[Any]

    @property
    def reading(self) -> Mapping[str, Any]:
        """Execution options that make a transaction one snapshot."""

    def lock(self, connection: sa.Connection, number: int) -> None:
        """Take lock ``number`` until the transaction ends; one writer at a time has it."""

    def begin_migration(self, connection: sa.Connection) -> None:
        """Keep other processes from migrating, in a transaction that may take long."""

    def announce(self, connection: sa.Connection, pool: str) -> None:
        """Have every process that listens told, after the commit, that ``pool`` changed."""

    def mark_erased(self, connection: sa.Connection) -> None:
        """Note in the transaction that erases something that there is something to scrub."""

    def scrub(self) -> bool:
        """Overwrite what any process erased wherever a file still holds it.

        False: that can't be done just now, and is to be tried again.
        """

    def listening(self, wake: Callable[[], None]) -> AbstractContextManager[None]:
        """While open, ``wake`` may be called from another thread soon after any change."""


class Database:
    """An engine with read and write transactions; every database error becomes `PoolError`."""

    def __init__(self, url: str, must_exist: bool = False) -> None:
        """Connect nothing yet; raises `PoolError` for a URL that can't work."""
        try:
            parsed = sa.make_url(url)
        except ArgumentError as error:
            raise PoolError(f"database URL can't be used: {error}") from error
        except ValueError as error:  # SQLAlchemy makes a number of it; not told, it may be a secret
            raise PoolError("database URL can't be used: its port is no number") from error
        self.name = parsed.render_as_string(hide_password=True)
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        self.backend = _backend(parsed, must_exist)
        self.engine = self.backend.engine

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """One snapshot."""
        with self._errors(), self.engine.connect() as connection:
            connection = connection.execution_options(**self.backend.reading)
            with connection.begin():
                yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """One transaction, durable when the block has ended without an exception."""
        with self._errors(), self.backend.writers, self.engine.connect() as connection:
            connection = connection.execution_options(memshare_write=True)
            with connection.begin():
                yield connection

    def scrub(self) -> bool:
        """See `Backend.scrub`."""
        with self._errors():
            return self.backend.scrub()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            cause = getattr(error, "orig", None) or error
            # A paused process may find its connection ended, which psycopg calls internal.
            ended = getattr(error, "connection_invalidated", False)
            standby = getattr(cause, "sqlstate", None) == _STANDBY
            passing = isinstance(error, _PASSING) or ended or standby
            kind = PoolUnavailable if passing else PoolError
            raise kind(f"{self.name}: {cause}") from error

    def migrate(self) -> None:
        """Bring the schema to `HEAD`; a database newer than this code raises `PoolError`."""
        with self.read() as connection:
            if _version(connection) == HEAD:
                return
        # Alembic is slow to import, and an up-to-date database does not need it.
        from alembic import command
        from alembic.config import Config
        from alembic.script import ScriptDirectory

        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
        with self.write() as connection:
            self.backend.begin_migration(connection)
            version = _version(connection)  # again: another process may have migrated meanwhile
            if version is not None and version not in known:
                raise PoolError(
                    f"{self.name}: its schema is version {version}, newer than this memshare knows "
                    f"({HEAD}); upgrade memshare"
                )
            if version != HEAD:
                config.attributes["connection"] = connection
                command.upgrade(config, HEAD)


def _backend(url: sa.URL, must_exist: bool) -> Backend:
    serialise = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
    # Each is imported where it is used: the other's driver need not be there.
    if url.drivername in ("sqlite", "sqlite+pysqlite"):
        from memshare.pool.sqlite import SQLite

        return SQLite(url, must_exist, serialise)
    if url.drivername in ("postgresql", "postgresql+psycopg", "postgres"):
        from memshare.pool.postgres import PostgreSQL

        return PostgreSQL(url, serialise)
    raise PoolError(
        f"{url.render_as_string(hide_password=True)}: database URL can't be used; sqlite:///PATH "
        "or postgresql://USER@HOST/DATABASE expected"
    )


def _version(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    version = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
    return None if version is None else str(version)
