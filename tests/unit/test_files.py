"""Atomic writes and the lock on a run folder, with real processes that die."""

import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from memshare.files import (
    NETWORK_FILE_SYSTEMS,
    DiskFull,
    NoRunFolder,
    RunLocked,
    file_system,
    full_disk_told,
    is_stream,
    run_lock,
    sha256_file,
    write_ahead,
    write_atomic,
    write_json,
)
from tests.disks import fill_up, small_disk


def child(code: str, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True
    )


HOLD = """
import sys, time
from pathlib import Path
from memshare.files import run_lock
with run_lock(Path(sys.argv[1]), sys.argv[2]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_refused_until_the_first_dies(tmp_path: Path) -> None:
    run = tmp_path / "run"
    holder = child(HOLD, str(run), "gateway")
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        told = rf"another gateway .*pid {holder.pid} on {platform.node()}\).* its own run\.dir$"
        refused = pytest.raises(RunLocked, match=told)
        with refused, run_lock(run, "gateway"):
            pytest.fail("two holders")
        with run_lock(run, "continual"):
            pass  # another role on the same folder
        with run_lock(tmp_path / "other", "gateway"):
            pass  # the same role on another folder
        holder.send_signal(signal.SIGKILL)
        holder.wait(timeout=30)
        with run_lock(run, "gateway"):
            owner = (run / "gateway.lock").read_text()
            assert owner == f"{os.getpid()} on {platform.node()}"
    finally:
        holder.kill()
        holder.communicate()


@pytest.mark.parametrize("below", ["", "deep/er"])
def test_a_folder_that_can_not_be_is_told_in_one_line(tmp_path: Path, below: str) -> None:
    file = tmp_path / "file"
    file.touch()
    told = rf"^--output {file / below}: no folder to write in \(.*(exists|Not a directory).*\)$"
    refused = pytest.raises(NoRunFolder, match=told)
    with refused, run_lock(file / below, "training", setting="--output"):
        pytest.fail("held")


def test_a_lock_that_there_is_no_room_for_is_told_in_one_line(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        (disk / "mining.lock").touch()
        fill_up(disk)
        told = rf"^run\.dir {disk}: no room to write \(.*No space left.*\)$"
        with pytest.raises(NoRunFolder, match=told), run_lock(disk, "mining"):
            pytest.fail("held")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """As Lustre's that was mounted without them."""

    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    told = (
        rf"^run\.dir {tmp_path}: can't be locked \(.*{os.strerror(number)}.*mount option is flock"
    )
    with pytest.raises(NoRunFolder, match=told), run_lock(tmp_path, "mining"):
        pytest.fail("held")


def test_what_fails_for_want_of_room_is_told_what_to_do() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "shard")
    for error in (full, sqlite3.OperationalError("database or disk is full")):
        told = rf"^{re.escape(str(error))}; free some space"
        with pytest.raises(DiskFull, match=told), full_disk_told():
            raise error
    for other in (OSError(errno.EACCES, "Permission denied"), RuntimeError("the disk is full")):
        with pytest.raises(type(other)) as caught, full_disk_told():
            raise other
        assert caught.value is other


def test_who_waits_gets_the_lock_when_the_holder_dies(tmp_path: Path) -> None:
    holder = child(HOLD, str(tmp_path), "mining")
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    waiter = child(HOLD.replace("sys.argv[2]", "sys.argv[2], wait=True"), str(tmp_path), "mining")
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            waiter.wait(1.0)  # a refused one would have ended
        holder.kill()
        assert waiter.stdout is not None
        assert waiter.stdout.readline() == "held\n"
        owner = (tmp_path / "mining.lock").read_text()
        assert owner == f"{waiter.pid} on {platform.node()}"
    finally:
        for process in (holder, waiter):
            process.kill()
            process.communicate()


def test_the_file_system_is_that_of_the_nearest_mount(tmp_path: Path) -> None:
    assert file_system(Path("/proc/self/none/there")) == "proc"
    assert file_system(tmp_path / "not" / "there") == file_system(tmp_path) != ""
    assert file_system(tmp_path) not in NETWORK_FILE_SYSTEMS


def test_the_lock_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), run_lock(tmp_path, "gateway"):
        raise KeyError("inside")
    with run_lock(tmp_path, "gateway"), pytest.raises(RunLocked), run_lock(tmp_path, "gateway"):
        pytest.fail("one process, two holders")


WRITE = """
import sys
from pathlib import Path
from memshare.files import write_atomic
n = 0
while True:
    write_atomic(Path(sys.argv[1]), (b"%d " % n) * 200_000)
    n += 1
    if n == 2:
        print("writing", flush=True)
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    for attempt in range(5):
        write_atomic(path, "old")
        writer = child(WRITE, str(path))
        try:
            assert writer.stdout is not None and writer.stdout.readline() == "writing\n"
            time.sleep(0.003 * attempt)
        finally:
            writer.kill()
            writer.communicate()
        words = path.read_bytes().split()
        assert len(words) == 200_000 and len(set(words)) == 1


STOP_BEFORE = """
import os, signal, sys
from pathlib import Path
from memshare import files
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
setattr(os, sys.argv[2], die)
files.write_atomic(Path(sys.argv[1]), "new")
"""


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_writer_killed_before_the_rename_leaves_the_old_content(
    tmp_path: Path, step: str
) -> None:
    path = tmp_path / "state.json"
    write_atomic(path, "old")
    writer = child(STOP_BEFORE, str(path), step)
    writer.communicate(timeout=30)
    assert writer.returncode == -signal.SIGKILL
    assert path.read_text() == "old"


def test_an_error_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_json(path, {"é": [1, 2.5, None]})
    before = path.read_bytes()
    assert json.loads(before) == {"é": [1, 2.5, None]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"bad": float("nan")})
    with pytest.raises(TypeError):
        write_atomic(path, 7)  # type: ignore[arg-type]
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_file_stays_what_it_is(tmp_path: Path) -> None:
    """Root's ``--json /dev/stdout`` put a file in its place."""
    pipe, file = tmp_path / "pipe", tmp_path / "file"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as thread:
        read = thread.submit(pipe.read_text)
        write_atomic(pipe, "all of it")
        assert read.result(timeout=60) == "all of it" and pipe.is_fifo()
    assert all(is_stream(Path(name)) for name in ("/dev/null", "/dev/stdout", "/dev/fd/63"))
    assert not any(map(is_stream, (file, tmp_path, Path("/dev/shm/run/CURRENT"))))
    with file.open("w") as handle:
        print("before", file=handle, flush=True)
        write_atomic(Path(f"/dev/fd/{handle.fileno()}"), "after")
    assert file.read_text() == "before\nafter"


def test_sha256_of_a_file(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "blob").write_bytes(data)
    assert sha256_file(tmp_path / "blob") == hashlib.sha256(data).hexdigest()


def test_who_finds_a_file_of_sqlites_just_being_made_waits(tmp_path: Path) -> None:
    path = tmp_path / "new.db"
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as first:
        first.execute("CREATE TABLE t (x)")
        with closing(sqlite3.connect(path, isolation_level=None, timeout=60)) as second:
            second.execute("SELECT * FROM t").fetchall()
            first.execute("BEGIN IMMEDIATE")
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                write_ahead(second, 0.05)
            threading.Timer(0.3, first.execute, ("COMMIT",)).start()
            write_ahead(second, 60)
            assert second.execute("PRAGMA journal_mode").fetchone() == ("wal",)
