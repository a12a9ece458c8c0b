"""Child processes that live and die together: started, watched, stopped in order.

One that may fail on its own is started again (`Restarted`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from memshare.children import Child
from memshare.progress import log


def shared_cores() -> dict[str, str]:
    """The environment of programs that share cores: a thread that waits sleeps, it doesn't spin.

    torch's OpenMP spins by default, and two such processes slow each other tenfold.
    """
    return {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}


class Supervisor:
    """Starts parts, with their logs in ``log_dir``, and stops them in the right order."""

    def __init__(self, log_dir: Path, grace_seconds: float) -> None:
        """``grace_seconds``: from asking a part to stop to killing it."""
        self._log_dir = log_dir
        self._grace = grace_seconds
        self.parts: list[Child] = []

    def start(
        self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None
    ) -> Child:
        """Start one part; what it prints goes to ``NAME.log``. Raises `OSError`."""
        part = Child(command, self._log_dir / f"{name}.log", env)
        self.parts.append(part)
        log(f"started {name} (pid {part.process.pid}, log {part.log_file})")
        return part

    def dead(self) -> Child | None:
        """The first part that has ended, by itself and with whatever exit code."""
        return next((part for part in self.parts if part.process.poll() is not None), None)

    def stop(self) -> bool:
        """Stop every part, the last started first; False if one had to be killed."""
        clean = True
        for part in reversed(self.parts):
            if not part.stop(self._grace):
                log(f"{part.name} did not stop in {self._grace:g} s: killed")
                clean = False
            log(f"stopped {part.name} (exit {part.process.returncode})")
        self.parts.clear()
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
        self.part: Child | None = None
        self._supervisor = supervisor
        self._start = (name, command, env)
        self._first, self._pause = first, 0.0
        self._due = self._started = time.monotonic()

    @property
    def failed_before(self) -> bool:
        """Whether it was put off already."""
        return self._pause > 0

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
