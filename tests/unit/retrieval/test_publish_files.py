"""What a publish leaves on disk: a folder for others to read; and nothing, where it fails."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path

import pytest

from memshare.config import Config
from memshare.pool.store import PoolStore
from memshare.retrieval import publish as publish_module
from memshare.retrieval import shelf
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.generation import current, load
from memshare.retrieval.publish import PublishError, activate, record_rejection, unpin
from memshare.retrieval.shelf import numbers
from tests.retrieving import publish_now


def test_others_may_read_it(store: PoolStore, config: Config, encoders: list[Encoder]) -> None:
    """The temporary folder that it was written in was its writer's alone."""
    publish_now(store, config, encoders[0])
    folder = config.retriever_dir / "000001"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


def broken(*_: object) -> None:
    raise OSError(errno.EIO, "I/O error")


def test_one_that_can_not_become_current_is_taken_back(
    store: PoolStore, config: Config, encoders: list[Encoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_now(store, config, encoders[0])
    with monkeypatch.context() as patch:
        patch.setattr(publish_module, "write_current", broken)
        with pytest.raises(PublishError, match=r"nothing was published, writing failed: .*I/O"):
            publish_now(store, config, encoders[0])
    assert numbers(config.retriever_dir) == [1]
    assert publish_now(store, config, encoders[0]) == 2 == current(config.retriever_dir)


def test_one_that_readers_have_met_as_current_is_not_taken_back(
    store: PoolStore, config: Config, encoders: list[Encoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CURRENT has moved, and what fails is to make that durable: it must not name nothing."""
    home, synced = config.retriever_dir, publish_module.fsync_dir
    publish_now(store, config, encoders[0])

    def then_broken(folder: Path) -> None:
        if shelf.read_current(home) != before:
            broken()
        synced(folder)

    before = shelf.read_current(home)
    with monkeypatch.context() as patch:
        patch.setattr(publish_module, "fsync_dir", then_broken)
        with pytest.raises(PublishError, match=r"generation 2 is CURRENT, but a crash .*I/O"):
            publish_now(store, config, encoders[1])
        before = shelf.read_current(home)
        with pytest.raises(PublishError, match=r"CURRENT is 1, pinned, but a crash .*I/O"):
            activate(home, 1)
        before = shelf.read_current(home)
        with pytest.raises(PublishError, match=r"CURRENT is 1, not pinned, but a crash .*I/O"):
            unpin(home)
    load(home).close()
    assert numbers(home) == [1, 2]
    assert publish_now(store, config, encoders[0]) == 3 == current(home)


def test_a_rejection_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(
        "os.fsync", lambda fd: synced.append(Path(f"/proc/self/fd/{fd}").readlink())
    )
    path = tmp_path / "main" / "rejected.jsonl"
    for number in (1, 2):
        record_rejection(path, {"round": number})
        assert {path, path.parent} <= set(synced)
        synced.clear()
    assert path.read_text() == '{"round": 1}\n{"round": 2}\n'


def test_every_exclusive_lock_is_one_that_other_hosts_see(
    store: PoolStore, config: Config, encoders: list[Encoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS tells its server of locks on files alone, and of exclusive ones if those are writable."""
    locks: set[Path] = set()
    whole = fcntl.flock

    def noted(fd: int, operation: int) -> None:
        if operation & fcntl.LOCK_EX:
            assert stat.S_ISREG(os.fstat(fd).st_mode)
            assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
            locks.add(Path(f"/proc/self/fd/{fd}").readlink())
        whole(fd, operation)

    monkeypatch.setattr("fcntl.flock", noted)
    for _ in range(2):
        publish_now(store, config, encoders[0], keep=1)  # which prunes, the second time
    assert len(locks) == 4  # of the retriever, of two publishes, and of the first one's leases


def test_a_publish_under_way_is_no_crash_s(config: Config) -> None:
    home = config.retriever_dir
    with shelf.scratch(home) as mine:
        (mine / "weights").touch()
        with shelf.scratch(home) as other:
            assert (mine / "weights").is_file() and other != mine
    assert [item.name for item in home.iterdir()] == [".lock"]


def test_a_file_system_without_locks_costs_no_files(
    store: PoolStore, config: Config, encoders: list[Encoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A searcher tries again every half minute: each try must give back what it opened."""

    def unlocked(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    publish_now(store, config, encoders[0])
    monkeypatch.setattr("fcntl.flock", unlocked)
    opened = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with pytest.raises(OSError, match="No locks"):
            shelf.Lease(config.retriever_dir, 1)
        with pytest.raises(OSError, match="No locks"), shelf.scratch(config.retriever_dir):
            pass
    assert len(list(Path("/proc/self/fd").iterdir())) == opened


def test_a_disk_that_takes_no_new_current_is_told_of(
    store: PoolStore, config: Config, encoders: list[Encoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    home = config.retriever_dir
    for encoder in encoders:
        publish_now(store, config, encoder)
    activate(home, 2)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(PublishError, match=r"CURRENT can't be moved to 1: .*No space"):
            activate(home, 1)
        with pytest.raises(PublishError, match=r"CURRENT can't be moved to 2: .*No space"):
            unpin(home)
    assert shelf.read_current(home) == (2, True)
