"""Keep freed memory: what a step frees, the next one takes again."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_SIZES = (2**31 - 1, 2**25)  # bytes: what an int holds, and the most that older versions take


def keep_freed_memory() -> bool:
    """Have glibc's malloc keep large blocks that were freed; whether it does.

    By default it gives them back to the system and asks for them anew at every step: page by page,
    each of them zeroed. The process never shrinks below its peak from here on. On other C
    libraries nothing is changed.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    kept = any(mallopt(_M_MMAP_THRESHOLD, size) for size in _SIZES)
    return kept and bool(mallopt(_M_TRIM_THRESHOLD, _SIZES[0]))
