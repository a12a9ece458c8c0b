"""Small file systems for tests: disks that can be filled up."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of ``size`` (as tmpfs takes it) at ``folder``; skips the test without root."""
    libc = ctypes.CDLL(None, use_errno=True)
    folder.mkdir()
    if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={size}".encode()) != 0:
        pytest.skip(f"mounting a tmpfs needs root: {os.strerror(ctypes.get_errno())}")
    try:
        yield folder
    finally:
        libc.umount2(str(folder).encode(), 2)


def fill_up(disk: Path) -> Path:
    """Take all that is free on ``disk``; returns the file to delete for room."""
    ballast = disk / "ballast"
    ballast.write_bytes(b"\0" * shutil.disk_usage(disk).free)
    return ballast
