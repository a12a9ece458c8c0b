"""Progress of long work: a bar on a terminal, plain lines elsewhere (logs, SLURM, CI)."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import suppress
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
_LINE_EVERY_SECONDS = 10.0


def _plain(message: str) -> None:
    # Where it can't be read any more (its terminal was closed, its disk is full) the work goes on,
    # and is above all still stopped in order.
    with suppress(OSError):
        print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


_write: Callable[[str], None] = _plain


def log_through(write: Callable[[str], None]) -> None:
    """Hand what `log` is given to ``write`` from now on, for a program with a log of its own."""
    global _write
    _write = write


def log(message: str) -> None:
    """One plain line on standard error, with the time, flushed (see `log_through`)."""
    _write(message)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield ``items`` while showing how far they are; ``total`` defaults to ``len(items)``."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            yield from bar.track(items, total=total, description=description)
        return
    last = time.monotonic()
    done = 0
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() - last >= _LINE_EVERY_SECONDS:
            last = time.monotonic()
            log(f"{description}: {done}" + (f"/{total}" if total else ""))
    log(f"{description}: {done} done")
