"""Child processes that live and die together: started, watched, stopped in order.

One that may fail on its own is started again (`Restarted`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from memshare.progress import log

_TAIL_LINES, _TAIL_BYTES = 20, 8192


def shared_cores() -> dict[str, str]:
    """The environment of programs that share cores: a thread that waits sleeps, it doesn't spin.

    torch's OpenMP spins by default, and two such processes slow each other tenfold.
    """
    return {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}


@dataclass
class Part:
    """One child: its name, its log file, its process, and where in the log its own words begin."""

    name: str
    log_file: Path
    process: subprocess.Popen[bytes]
    begin: int

    def tail(self) -> str:
        """The last lines that it wrote to its log."""
        with open(self.log_file, "rb") as handle:
            handle.seek(0, os.SEEK_END)
            handle.seek(max(self.begin, handle.tell() - _TAIL_BYTES))
            text = handle.read().decode("utf-8", errors="replace")
        return "\n".join(text.splitlines()[-_TAIL_LINES:])


class Supervisor:
    """Starts parts, each in a session of its own with its log in ``log_dir``.

    A session of its own: Ctrl-C on the terminal then reaches the supervisor alone, which stops the
    parts in the right order.
    """

    def __init__(self, log_dir: Path, grace_seconds: float) -> None:
        """``grace_seconds``: from asking a part to stop to killing it."""
        log_dir.mkdir(parents=True, exist_ok=True)
        self._log_dir = log_dir
        self._grace = grace_seconds
        self.parts: list[Part] = []

    def start(
        self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None
    ) -> Part:
        """Start one part; what it prints goes to ``NAME.log``. Raises `OSError`."""
        path = self._log_dir / f"{name}.log"
        output: IO[bytes]
        with open(path, "ab") as output:
            begin = output.tell()
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=None if env is None else dict(env),
                start_new_session=True,
            )
        part = Part(name, path, process, begin)
        self.parts.append(part)
        log(f"started {name} (pid {process.pid}, log {path})")
        return part

    def dead(self) -> Part | None:
        """The first part that has ended, by itself and with whatever exit code."""
        return next((part for part in self.parts if part.process.poll() is not None), None)

    def stop(self) -> bool:
        """Stop every part, the last started first; False if one had to be killed."""
        clean = True
        for part in reversed(self.parts):
            clean = self._stop(part) and clean
        self.parts.clear()
        return clean

    def _stop(self, part: Part) -> bool:
        process = part.process
        clean = True
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(self._grace)
            except subprocess.TimeoutExpired:
                log(f"{part.name} (pid {process.pid}) did not stop in {self._grace:g} s: killed")
                clean = False
        # Its session may outlive it (a worker of a crashed server, say): nothing is left behind.
        _kill_session(process.pid)
        process.wait()
        log(f"stopped {part.name} (exit {process.returncode})")
        return clean


class Restarted:
    """A part that may fail while the others go on: it is started again, after a pause.

    The pause is ``first`` seconds, and twice as long after each failure in a row, up to an hour;
    ``first`` again for one that ran for longer than that.
    """

    LONGEST = 3600.0

    def __init__(
        self,
        supervisor: Supervisor,
        name: str,
        command: Sequence[str],
        env: Mapping[str, str] | None,
        first: float,
    ) -> None:
        """Starts nothing yet."""
        self.part: Part | None = None
        self._supervisor = supervisor
        self._start = (name, command, env)
        self._first, self._pause = first, 0.0
        self._due = self._started = time.monotonic()

    def start_if_due(self) -> None:
        """Start it, unless it runs, has ended well, or has to wait."""
        if self.part is None and time.monotonic() >= self._due:
            self.part = self._supervisor.start(*self._start)
            self._started = time.monotonic()

    def put_off(self) -> float:
        """Have it started again, now that it has failed; in how many seconds."""
        assert self.part is not None
        self._supervisor.parts.remove(self.part)
        now, self.part = time.monotonic(), None
        anew = not self._pause or now - self._started > self.LONGEST
        self._pause = self._first if anew else min(2 * self._pause, self.LONGEST)
        self._due = now + self._pause
        return self._pause


def _kill_session(leader: int) -> None:
    """Kill what is left of a child's process group, which it led from its start."""
    deadline = time.monotonic() + 5.0
    try:
        while time.monotonic() < deadline:
            os.killpg(leader, signal.SIGKILL)
            time.sleep(0.05)
    except (ProcessLookupError, PermissionError):
        return  # the group is empty (macOS says PermissionError for one of zombies)
