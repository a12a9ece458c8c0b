"""Memory ids: UUID version 7 (RFC 9562) as 32 hex digits, increasing within a process."""

from __future__ import annotations

import argparse
import re
import secrets
import threading
import time

ID = re.compile(r"[A-Za-z0-9_-]{1,64}")  # what an id may be: an import brings ids of its own
_lock = threading.Lock()
_last = 0


def new_id() -> str:
    """A unique id; ids made later in this process sort after it, across processes by time.

    48 bits of milliseconds and 12 bits of a millisecond's fraction, then 62 random bits. Two ids
    within one tick (about a quarter of a microsecond) take successive ticks.
    """
    global _last
    nanoseconds = time.time_ns()
    ticks = (nanoseconds // 1_000_000) << 12 | (nanoseconds % 1_000_000) * 4096 // 1_000_000
    with _lock:
        _last = ticks = max(ticks, _last + 1)
    high = (ticks >> 12) << 16 | 0x7000 | ticks & 0xFFF
    low = 0b10 << 62 | secrets.randbits(62)
    return f"{high:016x}{low:016x}"


def id_of(text: str) -> str:
    """``text`` if it can be an id, for a parser's ``type``."""
    if not ID.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no id")
    return text
