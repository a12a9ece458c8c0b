"""How a training program ends: exit codes, ``result.json``, and stopping when asked to.

``accelerate launch`` turns every exit code but 0 into 1, so whoever launches a training reads
``status`` in ``DIR/result.json``; the exit codes are for those who start the program directly.

=========  ====  ================================================================
status     code  meaning
=========  ====  ================================================================
trained    0     ``DIR/encoder`` is there
empty      66    nothing to train on, or nothing to learn: the round has no encoder
stopped    75    it was asked to stop; run the same command again to continue
failed     1     the message says why; nothing of an earlier encoder was touched
(none)     2     the command line or the configuration is wrong
=========  ====  ================================================================
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from tempfile import gettempdir
from types import FrameType
from typing import Any, Literal

from memshare.config import ConfigError
from memshare.files import DiskFull, disk_full, run_lock, write_atomic, write_json
from memshare.pool.errors import EXIT_DATABASE_AWAY, PoolUnavailable
from memshare.progress import log

Status = Literal["trained", "empty", "stopped", "failed"]
EXIT_CODES: dict[Status, int] = {"trained": 0, "empty": 66, "stopped": 75, "failed": 1}
EXIT_USAGE = 2
# In the report of train/index.py, whose exit code accelerate hides: try again later.
DATABASE_AWAY = "database away"
_STOPPING = b"\nstopping after this step, to be continued; once more (Ctrl-C) ends at once\n"


def write_result(output: Path, status: Status, **figures: Any) -> int:
    """Write ``output/result.json`` and return the exit code that goes with ``status``."""
    write_json(output / "result.json", {"status": status, **figures})
    return EXIT_CODES[status]


def empty(
    why: str, output: Path, figures: Mapping[str, Any], say: Callable[[str], None], writes: bool
) -> int:
    """End a training into ``output`` that has nothing to learn, without an encoder.

    Says ``why``, writes the result if this process ``writes``, and returns the exit code.
    """
    say(f"error: {why}; the encoder stays as it is")
    if writes:
        write_result(output, "empty", why=why, **figures)
    return EXIT_CODES["empty"]


def tell(error: Exception) -> int:
    """Log an error that ends a program; the exit code that goes with it."""
    log(f"error: {error}")
    if isinstance(error, PoolUnavailable):
        return EXIT_DATABASE_AWAY
    return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_CODES["failed"]


def read_result(output: Path) -> dict[str, Any] | None:
    """What the last training into ``output`` ended with; None where it did not end by itself."""
    try:
        result = json.loads((output / "result.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    assert isinstance(result, dict)
    return result


class Refused(RuntimeError):
    """A run that was refused before it began: what an earlier one has left stays as it is."""


@contextmanager
def told(output: Path, errors: tuple[type[Exception], ...], writes: bool) -> Iterator[None]:
    """Forget how an earlier run into ``output`` ended; say so if this one ends by an error.

    `Refused` and `ConfigError` bring the earlier result back, with its time: slurm/train.sbatch
    knows by that whether a run has written one. Only the process that ``writes`` touches
    ``result.json``. The error goes on; a full disk as `DiskFull`.
    """
    path, earlier, times = output / "result.json", None, (0, 0)
    if writes and path.exists():
        earlier, stat = path.read_bytes(), path.stat()
        times = stat.st_atime_ns, stat.st_mtime_ns
        path.unlink()
    try:
        yield
    except Exception as error:
        full = disk_full(error) and not isinstance(error, errors)
        with suppress(OSError):  # the error itself is told
            if earlier is not None and isinstance(error, (Refused, ConfigError)):
                write_atomic(path, earlier)
                os.utime(path, ns=times)
            elif writes and (full or isinstance(error, errors)):
                write_result(output, "failed", error=str(error))
        if full:
            raise DiskFull(
                f"{error}, in {output} or in {gettempdir()}, where the examples are spooled; the "
                "checkpoints are intact. Free some space and run the same command again"
            ) from error
        raise


@contextmanager
def attempt(
    output: Path, errors: tuple[type[Exception], ...], writes: bool, stop_file: Path | None = None
) -> Iterator[StopRequest]:
    """One process's part in a run into ``output``: `told`, `stop_requests`, and the folder's lock.

    Only the process that ``writes`` takes the lock and looks for ``stop_file``: one asks the file
    system for all, and a step makes what it saw known to the others. Raises `RunLocked`.
    """
    lock = run_lock(output, "training", setting="--output") if writes else nullcontext()
    with lock, told(output, errors, writes), stop_requests(stop_file if writes else None) as stop:
        yield stop


class StopRequest:
    """Whether this process was asked to stop: by a signal, a file, or the end of its launcher.

    `accelerate launch` of one process dies of SIGTERM without passing it on.
    """

    def __init__(self, file: Path | None = None) -> None:
        """Nobody has, yet."""
        self.signal: str | None = None
        self.file = file
        launched = "ACCELERATE_MIXED_PRECISION" in os.environ  # set by it, whatever it is told
        self._launcher = os.getppid() if launched else None

    @property
    def asked(self) -> bool:
        """Looks for file and launcher anew each time."""
        return (
            self.signal is not None
            or (self.file is not None and self.file.exists())
            or (self._launcher is not None and os.getppid() != self._launcher)
        )


@contextmanager
def stop_requests(file: Path | None = None) -> Iterator[StopRequest]:
    """Turn SIGTERM, SIGINT, SIGUSR1 (a scheduler's warning) and ``file`` into a request.

    It is for between steps; a second SIGINT ends the process at once. A file, since launchers die
    of SIGUSR1 instead of passing it on, and end their processes first where they have several.
    """
    request = StopRequest(file)

    def ask(number: int, frame: FrameType | None) -> None:
        request.signal = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.write(2, _STOPPING)  # nothing buffered: this may interrupt a line that is written

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
