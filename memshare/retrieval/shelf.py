"""The folder of one retriever: its numbers, CURRENT, locks, leases, and what may be pruned.

It is the ``home`` that readers and publishers are given, and has the retriever's name.

::

    generations/<retriever>/000042/     an immutable generation
                            CURRENT     "42", or "42 pinned" after a roll-back
                            .lock       held while CURRENT or the set of numbers changes
                            .leases/    one lock file a generation: shared while it is loaded
                            .tmp-*      a publish under way, which holds .tmp-*.lock
                            .trash-*    being deleted

Locks are flocks, so the kernel drops them with the process: a crash leaves nothing held. Deleting
takes a lease's lock exclusively and never waits, so a lease taken first always wins; a reader that
takes it second finds the folder gone, and looks at CURRENT again.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from memshare.files import fsync_dir
from memshare.progress import log
from memshare.retrieval.manifest import DamagedGeneration, NoGeneration, folder_name

_LOCK = ".lock"


class Lease:
    """A shared lock on one generation: while it is held, nothing deletes the folder."""

    def __init__(self, home: Path, number: int) -> None:
        """Take the lease; raises `NoGeneration` where the folder is not there (any more)."""
        folder, path = home / folder_name(number), _lease_path(home, number)
        self._fd: int | None = None
        while folder.is_dir():
            path.parent.mkdir(exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_SH)
                if _same_file(self._fd, path) and folder.is_dir():
                    return
            except BaseException:  # such as a file system without locks
                self.release()
                raise
            self.release()  # the lock is on a file that a pruner unlinked: look again
        raise NoGeneration(f"{home}: there is no generation {number}")

    def release(self) -> None:
        """Give it back; a second call does nothing."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> Lease:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Give it back."""
        self.release()


def numbers(home: Path) -> list[int]:
    """Numbers of the generations on disk, oldest first; whole or not."""
    if not home.is_dir():
        return []
    return sorted(int(item.name) for item in home.iterdir() if item.name.isdecimal())


def read_current(home: Path) -> tuple[int | None, bool]:
    """What CURRENT says: (number, pinned); (None, False) before the first publish.

    Raises `DamagedGeneration` where the file is not what a publisher writes.
    """
    try:
        words = (home / "CURRENT").read_text(encoding="ascii").split()
    except FileNotFoundError:
        return None, False
    except UnicodeDecodeError:
        words = []
    if not words or not words[0].isdecimal() or words[1:] not in ([], ["pinned"]):
        raise DamagedGeneration(f"{home / 'CURRENT'}: damaged; activate a generation to rewrite it")
    return int(words[0]), words[1:] == ["pinned"]


def stage_current(home: Path, number: int, *, pinned: bool) -> Path:
    """Write the next CURRENT under a temporary name, durably: all of a move that takes space."""
    path = home / f".CURRENT.{os.getpid()}.tmp"
    try:
        with open(path, "wb") as handle:
            handle.write(f"{number} pinned\n".encode() if pinned else f"{number}\n".encode())
            handle.flush()
            os.fsync(handle.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return path


def write_current(home: Path, staged: Path) -> None:
    """Move CURRENT to what was staged, atomically; the caller holds the lock, and syncs."""
    staged.replace(home / "CURRENT")


@contextmanager
def locked(home: Path) -> Iterator[None]:
    """Hold the retriever's lock: for publishers, activations and pruning; waits for its turn."""
    home.mkdir(parents=True, exist_ok=True)
    fd = os.open(home / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextmanager
def scratch(home: Path) -> Iterator[Path]:
    """A temporary folder for a publish under way, removed at the end unless it was renamed.

    A lock beside it tells a live publisher's folder from one that a crash left behind, to other
    hosts as well: of one on the folder itself NFS would not tell them.
    """
    with locked(home):
        sweep(home)
        fd, name = tempfile.mkstemp(prefix=".tmp-", suffix=_LOCK, dir=home)
        fcntl.flock(fd, fcntl.LOCK_EX)
    folder = Path(name.removesuffix(_LOCK))
    try:
        folder.mkdir(0o700)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # what stays, the next publish sweeps
        with suppress(OSError):
            os.unlink(name)
        os.close(fd)


def sweep(home: Path) -> None:
    """Remove what crashed publishes and deletions left; the caller holds the lock."""
    for item in home.iterdir():
        if item.name.startswith(".trash-"):
            shutil.rmtree(item)
        elif item.name.startswith(".tmp-") and item.name.endswith(_LOCK):
            if _free(item):
                item.unlink(missing_ok=True)
        elif item.name.startswith(".tmp-"):
            if _free(Path(f"{item}{_LOCK}")) and item.is_dir():
                shutil.rmtree(item)
        elif item.name.startswith(".CURRENT.") and item.name.endswith(".tmp"):
            item.unlink()


def prune(home: Path, keep: int, always: Iterable[int]) -> list[int]:
    """Delete all but the newest ``keep`` generations, CURRENT, ``always`` and leased ones.

    The caller holds the lock. Returns the numbers that were deleted.
    """
    present = numbers(home)
    current, _ = read_current(home)
    kept = {current, *always, *present[-keep:]}
    gone = [number for number in present if number not in kept and discard(home, number)]
    if gone:
        log(f"{home.name}: deleted old generations {gone}")
    return gone


def discard(home: Path, number: int) -> bool:
    """Delete one generation unless it is leased; the caller holds the lock. True if deleted."""
    path = _lease_path(home, number)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        trash = home / f".trash-{folder_name(number)}"
        (home / folder_name(number)).rename(trash)  # gone at once, also if we die in the next line
        fsync_dir(home)
        # A reader that waits for the unlinked file's lock gets it, and then finds the folder gone.
        path.unlink(missing_ok=True)
        shutil.rmtree(trash)
        return True
    finally:
        os.close(fd)


def _lease_path(home: Path, number: int) -> Path:
    return home / ".leases" / folder_name(number)


def _same_file(fd: int, path: Path) -> bool:
    """Whether ``path`` still is the file that was opened as ``fd``."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _free(lock: Path) -> bool:
    """Whether nobody holds ``lock``, a file that may be gone."""
    try:
        fd = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True
