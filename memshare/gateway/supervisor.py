"""Child processes that live and die together: started, watched, stopped in order."""

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

_TAIL_BYTES = 8192


def shared_cores() -> dict[str, str]:
    """The environment of programs that share cores: a thread that waits sleeps, it doesn't spin.

    torch's OpenMP spins by default, and two such processes slow each other tenfold.
    """
    return {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}


@dataclass
class Part:
    """One child: its name, its log file, its process."""

    name: str
    log_file: Path
    process: subprocess.Popen[bytes]

    def tail(self, lines: int = 20) -> str:
        """The last lines of its log."""
        with open(self.log_file, "rb") as handle:
            handle.seek(0, os.SEEK_END)
            handle.seek(max(0, handle.tell() - _TAIL_BYTES))
            text = handle.read().decode("utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])


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
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=None if env is None else dict(env),
                start_new_session=True,
            )
        part = Part(name, path, process)
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


def _kill_session(leader: int) -> None:
    """Kill what is left of a child's process group, which it led from its start."""
    deadline = time.monotonic() + 5.0
    try:
        while time.monotonic() < deadline:
            os.killpg(leader, signal.SIGKILL)
            time.sleep(0.05)
    except (ProcessLookupError, PermissionError):
        return  # the group is empty (macOS says PermissionError for one of zombies)
