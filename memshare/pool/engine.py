"""Opening the pool's database: connection settings, transactions and migrations."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import Lock
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from memshare.files import NETWORK_FILE_SYSTEMS, file_system
from memshare.pool.errors import PoolError
from memshare.pool.schema import HEAD

BUSY_SECONDS = 30.0
MIGRATIONS = Path(__file__).parent / "migrations"


class Database:
    """An engine with read and write transactions; every database error becomes `PoolError`.

    On SQLite a writer takes the write lock when it begins (``BEGIN IMMEDIATE``) and waits up to
    `BUSY_SECONDS` for it: a transaction that read first and wrote later could not wait, it would
    fail with "database is locked".
    """

    def __init__(self, url: str, must_exist: bool = False) -> None:
        """Connect nothing yet; raises `PoolError` for a URL that can't work."""
        try:
            parsed = sa.make_url(url)
            self.name = parsed.render_as_string(hide_password=True)
            self.is_sqlite = parsed.get_backend_name() == "sqlite"
            if self.is_sqlite:
                if parsed.database in (None, "", ":memory:"):
                    raise PoolError(f"{self.name}: a pool needs a file: sqlite:///PATH")
                path = Path(str(parsed.database))
                if must_exist and not path.exists():
                    raise PoolError(f"{path}: no pool database there; create a pool first")
                if (kind := file_system(path)) in NETWORK_FILE_SYSTEMS:
                    raise PoolError(
                        f"{path}: is on a network file system ({kind}), where SQLite loses data; "
                        "set database_url to PostgreSQL, or to a file on a local disk"
                    )
                path.parent.mkdir(parents=True, exist_ok=True)
            self.engine = sa.create_engine(
                parsed,
                json_serializer=json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode,
                connect_args={"timeout": BUSY_SECONDS} if self.is_sqlite else {},
            )
        except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
            raise PoolError(f"database URL can't be used: {error}") from error
        except OSError as error:
            raise PoolError(f"{url}: its folder can't be made: {error}") from error
        # Threads of this process hand the writer's place on directly; SQLite's own wait sleeps.
        self._writers = Lock() if self.is_sqlite else nullcontext()
        if self.is_sqlite:
            event.listen(self.engine, "connect", _prepare_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """One snapshot."""
        with self._errors(), self.engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """One transaction, durable when the block has ended without an exception."""
        with self._errors(), self._writers, self.engine.connect() as connection:
            connection = connection.execution_options(memshare_write=True)
            with connection.begin():
                yield connection

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            cause = getattr(error, "orig", None) or error
            raise PoolError(f"{self.name}: {cause}") from error

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
            version = _version(connection)  # again: another process may have migrated meanwhile
            if version is not None and version not in known:
                raise PoolError(
                    f"{self.name}: its schema is version {version}, newer than this memshare knows "
                    f"({HEAD}); upgrade memshare"
                )
            if version != HEAD:
                config.attributes["connection"] = connection
                command.upgrade(config, HEAD)


def _version(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    version = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
    return None if version is None else str(version)


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver begins nothing itself; _begin_sqlite does
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            break
        except connection.OperationalError as error:
            # Two processes that create one file: this switch does not wait for the other's lock.
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA secure_delete = ON")  # deleted text is overwritten, not unlinked


def _begin_sqlite(connection: sa.Connection) -> None:
    write = connection.get_execution_options().get("memshare_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
