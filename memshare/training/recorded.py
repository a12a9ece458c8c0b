"""Becomes a program of the loop, after it has recorded itself: recorded.py RECORD COMMAND ...

A loop that was killed between starting a program and writing down which would leave one that runs
on, and that the next loop does not know.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil

from memshare.files import write_json


def write_record(record: Path) -> None:
    """Which session to stop, and since when there is it."""
    session = os.getpid()
    write_json(record, {"session": session, "created": psutil.Process(session).create_time()})


if __name__ == "__main__":
    write_record(Path(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
