"""What is deleted or put on hold leaves the training examples, and comes into none.

Several processes write shards at a time: those that mine a round together, and those that erase,
among them a loop that waits while somebody mines by hand. All of them write under one lock.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from memshare.files import run_lock, write_json
from memshare.pool.store import PoolStore
from memshare.records import Example
from memshare.training.examples import SCHEMA, read_shard, write_shard
from memshare.training.mining_plan import PLAN, read_plan
from memshare.training.shard import read_table

RECORD = "erased.json"
_PAGE = 10_000


def erase_deleted(store: PoolStore, examples_dir: Path, pools: Sequence[str]) -> int:
    """Erase what was deleted or put on hold since the last call from all examples on disk.

    Those are from ``pools``, and from others that were served once. A memory that is released later
    is mined again. Returns the number of shards rewritten. Raises `ExamplesError` naming a damaged
    shard or plan.
    """
    if not _behind(store, pools, _erased(examples_dir)):
        return 0  # the loop asks at every look: where nothing came, nobody is kept waiting
    with _writing(examples_dir):
        done = _erased(examples_dir)
        upto = _behind(store, pools, done)
        gone: set[str] = set()
        for pool in upto:
            since = done.get(pool, 0)
            while since < upto[pool] and (page := store.changes(pool, since, _PAGE)):
                gone |= {change.id for change in page if change.kind in ("delete", "hold")}
                since = page[-1].seq
        rewritten = erase(examples_dir, gone)
        if gone:  # who was killed while writing has left a part of a shard
            for part in examples_dir.glob("[0-9]*/**/.shard-*.tmp"):
                part.unlink()
        if upto:
            write_json(examples_dir / RECORD, {**done, **upto})
    return rewritten


def write_living(
    store: PoolStore, examples_dir: Path, path: Path, examples: Sequence[Example]
) -> None:
    """Write one shard without what was deleted or put on hold since ``examples`` were begun.

    `erase_deleted` looks at a deletion once. Were the shard written after that, nobody would ever
    erase it there; so the pool is asked and the shard written while nobody erases. Asked before
    and not after, so that a kill in between leaves no text that should be gone.
    """
    with _writing(examples_dir):
        ids = {each.query_id for each in examples}
        ids |= {candidate.id for each in examples for candidate in each.candidates}
        living = store.get_many(list(ids))
        gone = {each for each in ids if each not in living or living[each].held}
        write_shard(path, _without(examples, gone))


def erase(examples_dir: Path, memory_ids: Collection[str]) -> int:
    """Erase deleted memories from every shard, as queries and as candidates.

    Unfinished rounds and held-out examples are cleansed too. Returns the number of shards
    rewritten. Raises `ExamplesError` naming a damaged one; damage to columns other than the ids, in
    a shard that has none of these, is left to those who read them.
    """
    gone = set(memory_ids)
    sought = pa.array(sorted(gone), pa.string())
    rewritten = 0
    for path in sorted(examples_dir.glob("[0-9]*/**/shard-*.parquet")) if gone else ():
        if _mentions(path, sought):
            write_shard(path, _without(read_shard(path), gone))
            rewritten += 1
    return rewritten


def _mentions(path: Path, sought: pa.Array) -> bool:
    """Whether a shard has one of the ids ``sought``, as a query or as a candidate.

    Most shards have none, and there are more with every round: only their ids are read, and no
    records made of them. Raises `ExamplesError` for a shard whose ids can't be read.
    """
    columns = _ids(path)
    if columns is None or any(column.null_count for column in columns):
        columns = _id_columns(read_table(path, SCHEMA))  # which tells what is wrong, if anything
    *_, queries, candidates = columns
    found = (pc.any(pc.is_in(ids, sought)).as_py() for ids in (queries, candidates))
    return any(found)  # None of no ids at all


def _ids(path: Path) -> list[pa.ChunkedArray] | None:
    """`_id_columns` alone; None for a shard in another version's form, another library's, or none.

    Those are rare, and for `read_table`.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if not file.schema_arrow.equals(SCHEMA):
                return None
            paths = [file.schema.column(i).path for i in range(len(file.schema))]
            # Writers differ in what they call a list's items.
            table = file.read(columns=[p for p in paths if p == "query_id" or p.endswith(".id")])
        table.validate(full=True)  # Parquet's text may be no UTF-8
    except (OSError, pa.ArrowException, UnicodeDecodeError):
        return None
    return _id_columns(table)


def _id_columns(table: pa.Table) -> list[pa.ChunkedArray]:
    """The candidates as lists and flat, then the ids of the queries and those of the candidates."""
    flat = pc.list_flatten(table["candidates"])
    return [table["candidates"], flat, table["query_id"], pc.struct_field(flat, "id")]


def _writing(examples_dir: Path) -> AbstractContextManager[None]:
    """The right to write shards below ``examples_dir``, waited for.

    Who rewrites one that another has read meanwhile would lose what the other erases.
    """
    return run_lock(examples_dir, "erasing", wait=True, setting="examples in")


def _erased(examples_dir: Path) -> dict[str, int]:
    """Up to where each pool's log has been looked at for deletions."""
    try:
        done: dict[str, int] = json.loads((examples_dir / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        # Erasing from the beginning again does no harm, in whatever was mined.
        plans = examples_dir.glob(f"[0-9]*/**/{PLAN}")
        done = {pool: 0 for path in plans for pool in read_plan(path.parent).spans}
    return done


def _behind(store: PoolStore, pools: Iterable[str], done: Mapping[str, int]) -> dict[str, int]:
    """Where the logs end of those of ``pools``, and of those in ``done``, that end elsewhere now.

    One that is in the database no more is none of them.
    """
    known = {*pools, *done}
    ends = {info.name: info.last_seq for info in store.pools() if info.name in known}
    return {pool: end for pool, end in ends.items() if end != done.get(pool, 0)}


def _without(examples: Iterable[Example], gone: set[str]) -> list[Example]:
    return [_kept(example, gone) for example in examples if example.query_id not in gone]


def _kept(example: Example, gone: set[str]) -> Example:
    kept = tuple(candidate for candidate in example.candidates if candidate.id not in gone)
    if len(kept) == len(example.candidates):
        return example
    return replace(example, candidates=kept)
