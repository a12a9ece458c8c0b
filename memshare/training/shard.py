"""One shard of training examples as a table: in the form expected, and fit to be used.

Not only the miner writes shards. Columns in another order and the types that other libraries choose
for the same values (polars: ``large_string``) are brought into form; what can't be used is told by
file, row and column.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from memshare.config import MiningConfig
from memshare.training.iterations import iteration_of

LABELS = get_args(MiningConfig.model_fields["labels"].annotation)
_LISTED = "candidates"
_MAY_BE_NULL = {
    "principal", "baseline_loglik",
    *(f"{_LISTED}.{name}" for name in ("bm25_rank", "loglik", "dense_rank")),
}  # fmt: skip
# Shards of earlier versions are without these columns; they are read with nulls in them.
_ADDED = {f"{_LISTED}.prompt_key", f"{_LISTED}.principal", f"{_LISTED}.label_key"}


class ExamplesError(RuntimeError):
    """A folder of examples is unfinished, damaged or not one; the message names the file."""


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """The shard in ``path`` with the columns of ``schema``. Raises `ExamplesError`."""
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        if not table.schema.equals(schema):
            table = _formed(path, table, schema)
    except FileNotFoundError as error:
        raise ExamplesError(
            f"{path}: there is no such file; put it back or {_again(path)}"
        ) from error
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:  # the last of a name
        raise ExamplesError(
            f"{path}: damaged or unreadable ({error}); delete it and {_again(path)}"
        ) from error
    _check(path, table)
    return table


def _again(path: Path) -> str:
    inside = next((folder for folder in path.parents if folder.name.isdecimal()), None)
    if inside is None:
        return "write it again"
    command = f"run train/mine.py --round {inside.name}"
    if (iteration := iteration_of(path)) == 1:
        return command
    return (
        f"{command} --iteration {iteration} --proposer FOLDER, with the encoder that the iteration "
        "before it has trained"
    )


def _formed(path: Path, table: pa.Table, schema: pa.Schema) -> pa.Table:
    """``table`` with the columns of ``schema``, found by name, in their order and types."""
    expected, found = _names(schema), _names(table.schema)
    missing = sorted({*expected} - {*found} - _ADDED)
    odd = sorted((Counter(found) - Counter(expected)).keys())
    if missing or odd:
        lists = {"missing": missing, "not one of its columns": odd}
        told = "; ".join(f"{what}: {', '.join(names)}" for what, names in lists.items() if names)
        raise ExamplesError(f"{path}: not a shard of training examples ({told})")
    columns = []
    for field in schema:
        column = table[field.name]
        try:
            columns.append(column.cast(field.type))
        except pa.ArrowException as error:
            raise ExamplesError(
                f"{path}: column {field.name} has type {column.type} instead of {field.type} "
                f"({error})"
            ) from error
    return pa.table(columns, schema=schema)


def _names(schema: pa.Schema) -> list[str]:
    """Names of the columns, and ``candidates.NAME`` of the candidates' fields."""
    names = list(schema.names)
    for field in schema:
        inner = getattr(field.type, "value_type", None)
        if inner is not None and pa.types.is_struct(inner):
            names += [f"{field.name}.{each.name}" for each in inner]
    return names


def _check(path: Path, table: pa.Table) -> None:
    """Raise `ExamplesError` for the first value that can't be used, if there is one."""
    damage: Exception | None = None
    try:
        table.validate(full=True)  # Parquet's text may be no UTF-8
        sound = not any(column.null_count for column in _never_null(table))
        sound = sound and {*LABELS}.issuperset(pc.unique(table["labels"]).to_pylist())
    except (pa.ArrowException, UnicodeDecodeError) as error:
        sound, damage = False, error
    if not sound:
        told = next(_faults(table), f"damaged ({damage})")
        raise ExamplesError(f"{path}: {told}") from damage


def _never_null(table: pa.Table) -> Iterator[pa.ChunkedArray]:
    candidates = pc.list_flatten(table[_LISTED])
    yield candidates
    for name in _names(table.schema):
        if name not in _MAY_BE_NULL | _ADDED:
            _, _, inner = name.partition(".")
            yield pc.struct_field(candidates, inner) if inner else table[name]


def _faults(table: pa.Table) -> Iterator[str]:
    """What is wrong, row by row (1, 2, ...). Slow: for tables in which something is."""
    for row in range(len(table)):
        for name in table.column_names:
            for column, value in _values(table[name][row], name):
                where = f"row {row + 1}, column {column}"
                if value is None and column not in _MAY_BE_NULL | _ADDED:
                    yield f"{where}: null"
                elif isinstance(value, UnicodeDecodeError):
                    yield f"{where}: text that is not UTF-8 ({value})"
                elif column == "labels" and value not in LABELS:
                    yield f"{where}: {value!r} is none of {', '.join(LABELS)}"


def _values(cell: pa.Scalar, name: str) -> Iterator[tuple[str, Any]]:
    """The cell's value, and those of the candidates in it; an error where it can't be read."""
    if isinstance(cell, pa.ListScalar) and cell.is_valid:
        for item in cell.values:
            yield name, item if item.is_valid else None
            for field in item:
                yield from _values(item[field], f"{name}.{field}")
        return
    try:
        yield name, cell.as_py()
    except UnicodeDecodeError as error:
        yield name, error
