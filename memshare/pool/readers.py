"""Readers of foreign files: each streams ``(line, row)``, a row that can't be read as `BadRow`.

Lines count from 1; a data set's line is its row. Nothing here holds more than one row.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO, cast

from memshare.pool.errors import InvalidMemory, TransferError
from memshare.pool.mapping import Mappings, check_columns, from_strings

MAX_LINE_BYTES = 16 * 2**20
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True, slots=True)
class BadRow:
    """Why a line gave no row."""

    reason: str


Rows = Generator[tuple[int, object], None, None]


def read_jsonl(path: Path) -> Rows:
    """One JSON value a line; blank lines are skipped, a byte order mark is ignored."""
    with _told_if_torn(path), open_file(path) as handle:
        number = 0
        while line := handle.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = handle.readline(MAX_LINE_BYTES)
                yield number, BadRow(f"the line is longer than {MAX_LINE_BYTES} bytes")
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield number, _parse_json(line)


def _parse_json(line: bytes) -> object:
    try:
        return _DECODER.decode(line.decode())
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 (byte {error.start + 1} of the line)")
    except json.JSONDecodeError as error:
        return BadRow(f"bad JSON: {error.msg} (column {error.colno})")
    except (ValueError, RecursionError) as error:
        return BadRow(f"bad JSON: {error}")


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def read_csv(path: Path, mapping: Mappings) -> Rows:
    """Memories of a CSV file, whose header has their fields or the mapped columns.

    Raises `TransferError` if the header lacks one.
    """
    for number, record in read_records(path, lambda head: check_columns(str(path), head, mapping)):
        if isinstance(record, BadRow):
            yield number, record
            continue
        try:
            yield number, from_strings(record, mapping)
        except InvalidMemory as error:
            yield number, BadRow(str(error))


def read_records(
    path: Path, check: Callable[[list[str]], None], delimiter: str = ","
) -> Generator[tuple[int, dict[str, str] | BadRow]]:
    """Records, by column, of a CSV file with a header line, as RFC 4180 has it, in UTF-8.

    ``check`` is given the header before any of them.
    """
    # By itself csv gives up at 128 KiB, within the field, and takes its next line for a record.
    csv.field_size_limit(MAX_LINE_BYTES)
    # Bytes that are no UTF-8 come through as lone surrogates, so that they spoil only their record.
    with (
        _told_if_torn(path),
        TextIOWrapper(open_file(path), "utf-8-sig", "surrogateescape", newline="") as handle,
    ):
        records = csv.reader(handle, strict=True, delimiter=delimiter)
        try:
            header = next(records, None)
        except csv.Error as error:
            raise TransferError(f"{path}: line 1: {error}") from None
        if header is None:
            return
        check(header)
        while True:
            number = records.line_num + 1
            try:
                record = next(records)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, BadRow(f"bad CSV: {error}")
                continue
            if record:
                yield number, _csv_row(header, record)


def _csv_row(header: list[str], record: list[str]) -> dict[str, str] | BadRow:
    if len(record) != len(header):
        return BadRow(f"{len(record)} columns, but the header has {len(header)}")
    if any(_ESCAPED_BYTE.search(text) for text in record):
        return BadRow("not UTF-8")
    return dict(zip(header, record, strict=True))


def read_dataset(
    name: str, check: Callable[[list[str]], None], split: str, subset: str | None
) -> Rows:
    """Rows of a Hugging Face data set: a hub name, a saved one's folder, or a folder of files.

    ``check`` is given its columns, where they are known. Class labels become their names. Raises
    `TransferError` if it can't be loaded.
    """
    import datasets  # slow to import, and only needed here

    try:
        data = _load(datasets, name, split, subset)
        features = dict(data.features or {})
        if features:
            check(list(features))
        labels = {
            column: feature
            for column, feature in features.items()
            if isinstance(feature, datasets.ClassLabel)
        }
        for number, row in enumerate(data, 1):
            yield number, _name_labels(row, labels)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise TransferError(f"data set {name}, split {split}: can't be read: {error}") from error


def _load(datasets: Any, name: str, split: str, subset: str | None) -> Any:
    folder = Path(name)
    if (folder / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(name)
        if split not in saved:
            raise ValueError(f"it has the splits {', '.join(saved)}")
        return saved[split]
    if (folder / "state.json").is_file():
        return datasets.load_from_disk(name)
    return datasets.load_dataset(name, subset, split=split, streaming=True)


def _name_labels(row: Mapping[str, Any], labels: Mapping[str, Any]) -> object:
    named = dict(row)
    for column, feature in labels.items():
        if isinstance(named[column], int) and named[column] >= 0:
            named[column] = feature.int2str(named[column])
        else:  # -1 stands for a missing label
            named[column] = None
    return named


def open_file(path: Path) -> BinaryIO:
    """Open for reading, through gzip where its name ends so; raises `TransferError`."""
    try:
        if path.suffix == ".gz":
            return cast(BinaryIO, gzip.open(path, "rb"))
        return path.open("rb")
    except OSError as error:
        raise TransferError(f"{path}: can't be read: {error.strerror}") from error


@contextmanager
def _told_if_torn(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TransferError(f"{path}: no whole gzip file: {error}") from error
