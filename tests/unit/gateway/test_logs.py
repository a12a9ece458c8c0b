"""The log: lines of either form, and a reader that stalls."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import time

import pytest
from sqlalchemy.exc import OperationalError

from memshare.gateway.logs import REQUEST_ID, Background, JsonLines, PlainLines, logger, where


def record(message: str, **fields: object) -> logging.LogRecord:
    return logger.makeRecord(logger.name, logging.INFO, "", 0, message, (), None, extra=fields)


def test_lines_have_the_fields_and_the_requests_id() -> None:
    token = REQUEST_ID.set("r-1")
    try:
        entry = json.loads(JsonLines().format(record("done", status=200, principal="Zoë")))
        plain = PlainLines().format(record("done", status=200))
    finally:
        REQUEST_ID.reset(token)
    assert (entry["message"], entry["status"], entry["principal"]) == ("done", 200, "Zoë")
    assert (entry["request_id"], entry["level"]) == ("r-1", "info")
    assert entry["time"].endswith("+00:00")
    assert plain.endswith("done request_id=r-1 status=200")
    assert "request_id" not in json.loads(JsonLines().format(record("later")))


def test_a_reader_that_stalls_stops_nobody_and_hears_what_it_missed() -> None:
    read, write = os.pipe()
    handler = Background(os.fdopen(write, "w"), limit=100)
    handler.setFormatter(JsonLines())
    began = time.monotonic()
    for number in range(5000):  # far more than a pipe holds
        handler.emit(record("x" * 1000, status=number))
    assert time.monotonic() - began < 5
    with os.fdopen(read) as reader:
        # So many that what is left has room in the pipe, and the next line in the queue.
        seen = [json.loads(reader.readline()) for _ in range(120)]
        while not handler._lines.empty():
            time.sleep(0.01)
        handler.emit(record("again"))
        while (entry := json.loads(reader.readline()))["message"] != "again":
            seen.append(entry)
        handler.flush()
    shown = [entry["status"] for entry in seen if "status" in entry]
    notes = [entry["message"] for entry in seen if "lines were dropped" in entry["message"]]
    assert shown[:20] == list(range(20)) and shown == sorted(shown) and len(shown) < 2500
    assert sum(int(note.split()[0]) for note in notes) + len(shown) == 5000


class FullDisk(io.StringIO):
    """Takes nothing while it is ``full``."""

    full = True

    def write(self, text: str) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, "no space left")
        return super().write(text)


def test_a_full_disk_costs_its_lines_and_no_later_ones() -> None:
    disk = FullDisk()
    handler = Background(disk)
    handler.setFormatter(JsonLines())
    for number in range(5):  # the notes about lines that were dropped are dropped, too
        handler.emit(record("lost", status=number))
        handler.flush()
    disk.full = False
    began = time.monotonic()
    handler.emit(record("again"))
    handler.flush()
    assert time.monotonic() - began < 1.5  # exit waits for no thread that is gone
    said = [json.loads(line)["message"] for line in disk.getvalue().splitlines()]
    assert said == ["5 lines were dropped", "again"]


@pytest.mark.parametrize(
    ("said", "shown"),
    [("disk full\nSTATEMENT: secret", "OperationalError (disk full)"), ("", "OperationalError ()")],
)
def test_of_a_databases_error_only_its_first_line_is_told(said: str, shown: str) -> None:
    error = OperationalError("INSERT secret", {"text": "secret"}, Exception(said))
    assert where(error) == shown
