"""The gateway's log: one JSON object a line, without the text of memories and without keys.

What memories say must not leak into logs that other people keep, and the message of an exception
may quote them: so an exception is logged by its type and its place. Of messages, only a database's
own about its operation (disk full, connection refused) are shown.
"""

from __future__ import annotations

import json
import logging
import queue
import sys
import threading
import time
import traceback
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from sqlalchemy.exc import OperationalError

from memshare.progress import log_through

logger = logging.getLogger("memshare.gateway")
REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
# What log calls may add by `extra`.
_FIELDS = ("method", "route", "status", "seconds", "principal", "key", "pool", "reason", "failure")


def where(error: BaseException) -> str:
    """``Type at file:line``, its innermost place, and the same of what caused it."""
    parts: list[str] = []
    seen: BaseException | None = error
    while seen is not None and len(parts) < 5:
        frames = traceback.extract_tb(seen.__traceback__)
        place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        said = ""
        if isinstance(seen, OperationalError):  # its own text would show the statement's parameters
            told, _, _ = str(seen.orig).partition("\n")
            said = f" ({told})"
        parts.append(type(seen).__name__ + place + said)
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return ", from ".join(parts)


class JsonLines(logging.Formatter):
    """A record as one JSON object: time, level, message, the request's id, and its fields."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **_fields(record),
        }
        return json.dumps(entry, ensure_ascii=False, default=str)


class PlainLines(logging.Formatter):
    """The same for people, in one short line."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        clock = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        fields = " ".join(f"{name}={value}" for name, value in _fields(record).items())
        return f"{clock} {record.getMessage()} {fields}".rstrip()


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields = {name: getattr(record, name) for name in _FIELDS if hasattr(record, name)}
    if record.exc_info and record.exc_info[1]:
        fields["failure"] = where(record.exc_info[1])
    request_id = REQUEST_ID.get()
    return fields if request_id is None else {"request_id": request_id, **fields}


class Background(logging.Handler):
    """Writes lines from a thread of its own: a reader that stalls must not stop the gateway.

    While ``limit`` lines wait, further ones are dropped, and so are those that can't be written (a
    full disk), unless the stream keeps them for later; how many is said once there is room.
    """

    def __init__(self, stream: TextIO, limit: int = 10_000) -> None:
        """Write to ``stream``."""
        super().__init__()
        self._stream = stream
        # Each with how many lines are lost if it is: a note stands for those that it tells of.
        self._lines: queue.Queue[tuple[str, int]] = queue.Queue(limit)
        self._dropped = 0
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Hand one line over; never waits."""
        try:
            if self._dropped:
                lost = self._dropped
                note = logger.makeRecord(
                    logger.name, logging.WARNING, "", 0, f"{lost} lines were dropped", (), None
                )
                self._lines.put_nowait((self.format(note), lost))
                self._dropped = 0
            self._lines.put_nowait((self.format(record), 1))
        except queue.Full:
            self._dropped += 1

    def _write(self) -> None:
        while True:
            line, worth = self._lines.get()
            try:
                print(line, file=self._stream, flush=True)
            except (OSError, ValueError):  # ValueError: closed, or no such characters there
                self.acquire()  # `emit` is called with it
                self._dropped += worth
                self.release()
            self._lines.task_done()

    def flush(self) -> None:
        """Wait for what was handed over, two seconds at most; logging asks for it at exit."""
        deadline = time.monotonic() + 2.0
        while self._lines.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.005)


def install(kind: Literal["auto", "json", "plain"]) -> None:
    """Send every log of this process to standard error in that form; ``auto``: plain on a tty.

    For a program, once: it replaces the handlers of the root logger.
    """
    plain = kind == "plain" or (kind == "auto" and sys.stderr.isatty())
    handler = Background(sys.stderr)
    handler.setFormatter(PlainLines() if plain else JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("memshare").setLevel(logging.INFO)
    log_through(logging.getLogger("memshare").info)
