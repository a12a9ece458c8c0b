"""Import and export of memories, streamed in batches: memory use does not grow with the file.

An import keeps what the rows say of id, score, agent, model and time: it is an administrator's
act. Importing again what was imported adds nothing, so an import that broke off is just repeated.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, TextIO

from memshare.files import fsync_dir, is_stream
from memshare.pool.errors import InvalidMemory, TransferError
from memshare.pool.mapping import Mappings, check_columns, to_memory
from memshare.pool.readers import BadRow, Rows, read_csv, read_dataset, read_jsonl
from memshare.pool.store import PoolStore
from memshare.pool.validate import check_memory
from memshare.progress import track
from memshare.records import NewMemory

Format = Literal["auto", "jsonl", "chat", "csv", "datasets"]
BATCH = 1000
KEPT_ERRORS = 10_000


class RowError(NamedTuple):
    """A row that was left out: where it stands and why."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        """``file:line: reason``."""
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass
class ImportReport:
    """What an import did. ``bad`` counts every bad row, ``errors`` keeps the first 10,000."""

    stored: int = 0
    duplicates: int = 0
    bad: int = 0
    errors: list[RowError] = field(default_factory=list)


OnError = Callable[[RowError], None]


def import_memories(
    store: PoolStore,
    pool: str | None,
    path_or_hub: str | Path,
    fmt: Format = "auto",
    mapping: Mappings | None = None,
    strict: bool = False,
    *,
    split: str = "train",
    subset: str | None = None,
    on_error: OnError | None = None,
    show_progress: bool = False,
) -> ImportReport:
    """Import a file or a data set into ``pool`` (None: the pool that each row names).

    ``fmt`` ``auto``: by the file's name; a folder, or a name that is no file, is a data set, and a
    JSONL row with ``messages`` is in the chat form. ``mapping`` is field to column (see
    `mapping.parse_mapping`). ``split`` and ``subset`` are for data sets. A bad row is reported, to
    ``on_error`` as it is found too, and the others are imported; ``strict`` reads everything first
    and writes nothing if one row is bad. Raises `TransferError` if the source can't be read at all,
    or not twice where it is to be ``strict``, `UnknownPool` for ``pool``.
    """
    mapping = dict(mapping or {})
    source = str(path_or_hub)
    kind = detect(source) if fmt == "auto" else fmt
    if pool is not None:
        store.pool(pool)  # raises UnknownPool
    if strict and (Path(source).is_fifo() or Path(source).is_char_device()):
        raise TransferError(
            f"{source}: --strict reads twice, and this can be read once; write it to a file first"
        )
    known = {info.name for info in store.pools()}

    def rows() -> Iterator[tuple[int, NewMemory | BadRow]]:
        form = {"jsonl": "native", "chat": "chat"}.get(fmt, "auto")
        with closing(_read(kind, source, mapping, split, subset)) as lines:
            for line, row in lines:
                yield line, _checked(row, pool, mapping, form, known, store.max_text_chars)

    def watched(what: str) -> Iterator[tuple[int, NewMemory | BadRow]]:
        return track(rows(), f"{what} {source}") if show_progress else rows()

    report = ImportReport()
    if strict:
        for line, row in watched("check"):
            _note(report, source, line, row, on_error)
        if report.bad:
            return report
    batch: list[NewMemory] = []
    for line, row in watched("import"):
        if not _note(report, source, line, row, on_error):
            continue
        assert isinstance(row, NewMemory)
        batch.append(row)
        if len(batch) >= BATCH:
            _append(store, batch, report)
            batch.clear()
    _append(store, batch, report)
    return report


def detect(source: str) -> Format:
    """The format that a source's name tells; raises `TransferError` for a file it can't tell of."""
    path = Path(source)
    suffix = Path(source.removesuffix(".gz")).suffix.lower()
    if suffix in (".jsonl", ".ndjson", ".csv"):
        return "csv" if suffix == ".csv" else "jsonl"
    if path.is_file():
        raise TransferError(f"{source}: its name does not tell its format; say --format")
    return "datasets"


def _read(kind: Format, source: str, mapping: Mappings, split: str, subset: str | None) -> Rows:
    if kind == "csv":
        return read_csv(Path(source), mapping)
    if kind == "datasets":
        return read_dataset(
            source, lambda columns: check_columns(source, columns, mapping), split, subset
        )
    return read_jsonl(Path(source))


def _checked(
    row: object, pool: str | None, mapping: Mappings, form: str, known: set[str], max_chars: int
) -> NewMemory | BadRow:
    if isinstance(row, BadRow):
        return row
    try:
        memory = check_memory(to_memory(row, pool, mapping, form), max_chars)
    except InvalidMemory as error:
        return BadRow(str(error))
    if memory.pool not in known:
        return BadRow(f"no pool {memory.pool!r}; create it first")
    return memory


def _note(
    report: ImportReport, file: str, line: int, row: NewMemory | BadRow, on_error: OnError | None
) -> bool:
    """Count a bad row; True for a good one."""
    if isinstance(row, NewMemory):
        return True
    error = RowError(file, line, row.reason)
    report.bad += 1
    if len(report.errors) < KEPT_ERRORS:
        report.errors.append(error)
    if on_error is not None:
        on_error(error)
    return False


def _append(store: PoolStore, batch: list[NewMemory], report: ImportReport) -> None:
    for result in store.append_checked(batch):
        if result.status == "stored":
            report.stored += 1
        else:
            report.duplicates += 1


def export_jsonl(store: PoolStore, pool: str, path: Path) -> int:
    """Write the pool's living memories, one on a line in seq order; returns how many.

    Held memories are left out, since the form can't say that they are held. A file appears whole or
    not at all, where a link leads if ``path`` is one; a pipe or a device is written as it stands.
    Raises `UnknownPool`, and `TransferError` if it can't be written.
    """
    memories = (memory.wire() for memory in store.iter(pool))
    try:
        if is_stream(path) or path.is_dir():  # a folder refuses
            with path.open("a", encoding="utf-8", newline="\n") as handle:
                return write_jsonl(memories, handle)
        return _write_whole(path.resolve(), memories)
    except OSError as error:
        raise TransferError(f"{path}: can't be written: {error.strerror}") from error


def _write_whole(path: Path, rows: Iterator[Mapping[str, object]]) -> int:
    temporary = path.with_name(f".memshare-{os.getpid()}.tmp")  # however long the name is
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as handle:
            count = write_jsonl(rows, handle)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
        fsync_dir(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def write_jsonl(rows: Iterator[Mapping[str, object]], handle: TextIO) -> int:
    """Write one JSON object a line; returns how many."""
    count = 0
    for row in rows:
        handle.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        count += 1
    return count
