"""Programs as child processes: started with a log, their last words, and stopping them.

Each has a session of its own: Ctrl-C on the terminal reaches the parent alone, which stops its
children in order, and what a child started can be ended with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

_POLL_SECONDS = 0.05
_KILL_SECONDS = 30.0  # until what was killed is gone: a GPU's memory takes its time
_TAIL_LINES, _TAIL_BYTES = 30, 16_384


class Child:
    """One program: its process, and the log that what it prints is appended to."""

    def __init__(
        self, command: Sequence[str], log_file: Path, env: Mapping[str, str] | None = None
    ) -> None:
        """Start it. Raises `OSError`."""
        self.log_file = log_file
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with log_file.open("ab") as output:
            self._begin = output.tell()
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )

    @property
    def name(self) -> str:
        """What its log is named after."""
        return self.log_file.stem

    def tail(self) -> str:
        """The last lines that it wrote to its log."""
        try:
            with self.log_file.open("rb") as handle:
                handle.seek(0, os.SEEK_END)
                handle.seek(max(self._begin, handle.tell() - _TAIL_BYTES))
                text = handle.read().decode("utf-8", errors="replace")
        except OSError as error:
            return f"(no log: {error})"
        if not text:
            return "(it wrote nothing, or found no room for it)"
        return "\n".join(text.splitlines()[-_TAIL_LINES:])

    def stop(self, grace: float, *, everyone: bool = False) -> bool:
        """Stop all of its session, as `stop_session` does; False if it had to be killed."""
        clean = stop_session(self.process.pid, grace, everyone=everyone)
        self.process.wait()
        return clean


def members(session: int) -> set[int]:
    """The processes of a session that live."""
    found = set()
    for pid in psutil.pids():
        with suppress(ProcessLookupError, PermissionError, psutil.NoSuchProcess):
            if os.getsid(pid) == session and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.add(pid)
    return found


def stop_session(session: int, grace: float, *, everyone: bool = False) -> bool:
    """SIGTERM to a session's leader, or to ``everyone`` in it, and SIGKILL to what is left of it.

    That is what still runs when those who were asked have ended, or after ``grace`` seconds, and
    then False is returned.
    """
    asked = members(session)
    if not everyone:
        asked &= {session}
    _send(asked, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while (late := asked & members(session)) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    deadline = time.monotonic() + _KILL_SECONDS
    while (left := members(session)) and time.monotonic() < deadline:
        _send(left, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)
    return not late


def _send(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
