"""A real PostgreSQL server for tests, from the distribution's packages, and one that is killed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import Any

import psycopg

START_SECONDS = 60.0
_numbers = count()


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def programs() -> Path:
    """The folder of initdb and postgres. Raises `RuntimeError` if they are not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[-3]))
    if not found:
        raise RuntimeError("PostgreSQL is not installed: run make servers")
    return found[-1].parent


class PostgresServer:
    """One server on a folder of its own, as its distribution sets it up: fsync stays on."""

    def __init__(self, wal: Path | None = None) -> None:
        """Make the folder and start. ``wal``: an empty folder for the write-ahead log."""
        self.port = free_port()
        self._bin = programs()
        self._folder = Path(tempfile.mkdtemp(prefix="memshare-postgres-"))
        # PostgreSQL refuses to run as root.
        self._user: dict[str, Any] = {}
        if os.geteuid() == 0:
            self._user = {"user": "postgres", "group": "postgres", "extra_groups": []}
        self.give(self._folder)
        self._process: subprocess.Popen[bytes] | None = None
        try:
            log = []
            if wal is not None:
                self.give(wal)
                log = ["--wal-segsize=1", f"--waldir={wal}"]  # small ones, for small disks
            self._run("initdb", "--auth=trust", "--username=postgres", "--encoding=UTF8",
                      "--locale=C.UTF-8", "--no-sync", *log, "-D", str(self._data))  # fmt: skip
            self.start()
        except BaseException:
            self.close()
            raise

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    @property
    def log(self) -> Path:
        """What it says."""
        return self._folder / "log"

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self._bin / program, *arguments],
            cwd=self._folder, capture_output=True, text=True, **self._user,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{program}: {done.stderr}")

    def start(self) -> float:
        """Start and wait until it answers; returns the seconds that took."""
        began = time.monotonic()
        while time.monotonic() - began < START_SECONDS:
            if self._process is None or self._process.poll() is not None:
                # After a kill the old backends may hold the folder for a moment: then again.
                with self.log.open("ab") as log:
                    self._process = subprocess.Popen(
                        [self._bin / "postgres", "-D", self._data, "-p", str(self.port),
                         "-c", "listen_addresses=127.0.0.1", "-k", self._folder],
                        cwd=self._folder, stdout=log, stderr=log, **self._user,
                    )  # fmt: skip
            try:
                psycopg.connect(self.url("postgres"), connect_timeout=2).close()
                return time.monotonic() - began
            except psycopg.OperationalError:
                time.sleep(0.05)
        raise RuntimeError("PostgreSQL did not start:\n" + self.log.read_text())

    def give(self, folder: Path) -> None:
        """Make ``folder`` the server's own."""
        if self._user:
            shutil.chown(folder, "postgres", "postgres")

    @property
    def alive(self) -> bool:
        """Whether its first process runs."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """``kill -9`` of the postmaster; its backends end by themselves when they notice."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Stop, and remove the folder."""
        if self._process is not None and self.alive:
            self._process.send_signal(signal.SIGQUIT)  # at once, no checkpoint
            self._process.wait(START_SECONDS)
        shutil.rmtree(self._folder)

    def url(self, database: str, port: int | None = None) -> str:
        """The URL of a database."""
        return f"postgresql://postgres@127.0.0.1:{port or self.port}/{database}"

    def create(self, folder: Path | None = None) -> str:
        """A new empty database, its files in ``folder`` (an empty one); returns its name."""
        name = f"pool_{next(_numbers)}"
        where = ""
        if folder is not None:
            self.give(folder)
            self.run(f"CREATE TABLESPACE {name} LOCATION '{folder}'")
            where = f" TABLESPACE {name}"
        self.run(f"CREATE DATABASE {name}{where}")
        return name

    def run(self, statement: str) -> None:
        """Run a statement that belongs to no database."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(statement.encode())
