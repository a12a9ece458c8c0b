"""Small file-system helpers: atomic writes, hashing, SQLite's log, and the lock on a run folder."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

# Their locks and shared memory are not what a data base on one machine relies on.
NETWORK_FILE_SYSTEMS = frozenset(
    {
        "afs", "beegfs", "ceph", "cifs", "fuse.ceph", "fuse.glusterfs", "fuse.sshfs", "glusterfs",
        "gpfs", "lustre", "nfs", "nfs4", "orangefs", "panfs", "pvfs2", "smb3", "wekafs",
    }
)  # fmt: skip

_BUSY_SECONDS = 60.0  # how long a cache is waited for that others write


class RunLocked(RuntimeError):
    """Another process holds this role on the run folder."""


class NoRunFolder(RunLocked):
    """The run folder can't be made, written or locked, so that nobody can hold a role on it."""


class DiskFull(RuntimeError):
    """Something could not be written for want of room, in a place that has no word of its own."""


def fsync_dir(folder: Path) -> None:
    """Make a rename or a new entry in ``folder`` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_tree(folder: Path) -> None:
    """Make ``folder`` and everything in it durable."""
    for path in (*folder.rglob("*"), folder):
        fsync_dir(path)  # which does the same for a file


def is_stream(path: Path) -> bool:
    """Whether ``path`` is a device or a pipe, or names what a program was started with.

    A file put in its place, as root may, would take it from all programs.
    """
    named = path.absolute().parent in (Path("/dev"), Path("/dev/fd"))
    return named or path.is_char_device() or path.is_fifo()


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write ``path`` so that readers and crashes see the old content or the new, never a part.

    What `is_stream`, as with ``--json /dev/stdout``, is written as it stands.
    """
    data = data.encode() if isinstance(data, str) else data
    if is_stream(path):
        with path.open("ab") as handle:
            handle.write(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(tmp, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)
    fsync_dir(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented UTF-8 JSON, atomically; NaN is refused, since JSON has none."""
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def disk_full(error: Exception) -> bool:
    """Whether a write failed for want of room: of the disk, a quota, or a file's largest size.

    safetensors and tokenizers tell so in words alone, SQLite in words of its own.
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    told = str(error).lower()
    return os.strerror(errno.ENOSPC).lower() in told or "disk is full" in told


@contextmanager
def full_disk_told() -> Iterator[None]:
    """Raise `DiskFull`, a line that says what to do, for whatever fails for want of room."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        if not disk_full(error):
            raise
        raise DiskFull(f"{error}; free some space and start it again") from error


def file_system(path: Path) -> str:
    """Kind of the file system that holds ``path``, or will: ext4, nfs4, ...; empty if unknown."""
    mounts = {Path(each.mountpoint): each.fstype for each in psutil.disk_partitions(all=True)}
    where = path.resolve()
    return next((mounts[folder] for folder in (where, *where.parents) if folder in mounts), "")


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in chunks."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_ahead(connection: sqlite3.Connection, seconds: float) -> None:
    """Switch an SQLite file to a write-ahead log.

    Of several processes that create one file, all but one wait for it, up to ``seconds``, which
    SQLite's own waiting leaves out. Raises `sqlite3.OperationalError` after that.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def open_cache(path: Path | None, table: str) -> sqlite3.Connection:
    """An SQLite file of what can be made again, shared by threads and processes; None: in memory.

    ``table``: the one in it, "NAME (COLUMNS)". Raises `sqlite3.Error` where it can't be opened.
    """
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(
        path or ":memory:", timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
    )
    write_ahead(connection, _BUSY_SECONDS)
    # A crash of the machine may lose the last rows; they are made again.
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute(f"CREATE TABLE IF NOT EXISTS {table} WITHOUT ROWID")
    return connection


@contextmanager
def run_lock(
    run_dir: Path, role: str, wait: bool = False, setting: str = "run.dir"
) -> Iterator[None]:
    """Hold ``role`` (gateway, continual, ...) on a run folder; a second holder gets `RunLocked`.

    Or it shall ``wait`` its turn. ``setting`` is what names the folder, for the messages. Raises
    `NoRunFolder` where the folder can't be made, written or locked.

    The kernel drops the lock with the process, so a crash leaves nothing to clean up.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        # Unbuffered: what can't be written now would be tried again when it is closed.
        opened = open(run_dir / f"{role}.lock", "a+b", buffering=0)  # noqa: SIM115  # closed below
    except OSError as error:
        raise NoRunFolder(f"{setting} {run_dir}: no folder to write in ({error})") from error
    with opened as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            handle.truncate(0)
            handle.write(f"{os.getpid()} on {platform.node()}".encode())
        except BlockingIOError:
            handle.seek(0)
            owner = handle.read().decode(errors="replace").strip() or "unknown"
            raise RunLocked(
                f"{run_dir}: another {role} is running there (pid {owner}); "
                f"stop it first, or give this one its own {setting}"
            ) from None
        except OSError as error:
            if disk_full(error):
                raise NoRunFolder(f"{setting} {run_dir}: no room to write ({error})") from error
            raise NoRunFolder(
                f"{setting} {run_dir}: can't be locked ({error}); its file system must have locks "
                "(Lustre's mount option is flock)"
            ) from error
        yield
