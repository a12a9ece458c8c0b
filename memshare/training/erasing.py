"""What is deleted or put on hold leaves the training examples, and comes into none.

Several processes write shards at a time: those that mine a round together, and those that erase,
among them a loop that waits while somebody mines by hand. All of them write under one lock.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from memshare.files import run_lock, write_json
from memshare.pool.store import PoolStore
from memshare.records import Example
from memshare.training.examples import read_shard, write_shard

_PAGE = 10_000


def erase_deleted(store: PoolStore, examples_dir: Path, pools: Sequence[str]) -> int:
    """Erase what was deleted or put on hold since the last call from all examples on disk.

    A memory that is released later is mined again. Returns the number of shards rewritten. Raises
    `ExamplesError` naming a damaged shard.
    """
    path = examples_dir / "erased.json"
    if _ends(store, pools) == _only(pools, _erased(path)):
        return 0  # the loop asks at every look: where nothing came, nobody is kept waiting
    with _writing(examples_dir):
        done, upto = _erased(path), _ends(store, pools)
        gone: set[str] = set()
        for pool in pools:
            since = done.get(pool, 0)
            while since < upto[pool] and (page := store.changes(pool, since, _PAGE)):
                gone |= {change.id for change in page if change.kind in ("delete", "hold")}
                since = page[-1].seq
        rewritten = erase(examples_dir, gone)
        if upto != _only(pools, done):
            write_json(path, {**done, **upto})
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
    rewritten. Raises `ExamplesError` naming a damaged one.
    """
    gone = set(memory_ids)
    rewritten = 0
    for path in sorted(examples_dir.glob("[0-9]*/**/shard-*.parquet")) if gone else ():
        before = read_shard(path)
        after = _without(before, gone)
        if after != before:
            write_shard(path, after)
            rewritten += 1
    return rewritten


def _writing(examples_dir: Path) -> AbstractContextManager[None]:
    """The right to write shards below ``examples_dir``, waited for.

    Who rewrites one that another has read meanwhile would lose what the other erases.
    """
    return run_lock(examples_dir, "erasing", wait=True, setting="examples in")


def _erased(path: Path) -> dict[str, int]:
    """Up to where each pool's log has been looked at for deletions."""
    try:
        done: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        done = {}  # erasing from the beginning again does no harm
    return done


def _ends(store: PoolStore, pools: Iterable[str]) -> dict[str, int]:
    return {pool: store.last_seq(pool) for pool in pools}


def _only(pools: Iterable[str], done: dict[str, int]) -> dict[str, int]:
    return {pool: done.get(pool, 0) for pool in pools}


def _without(examples: Iterable[Example], gone: set[str]) -> list[Example]:
    return [_kept(example, gone) for example in examples if example.query_id not in gone]


def _kept(example: Example, gone: set[str]) -> Example:
    kept = tuple(candidate for candidate in example.candidates if candidate.id not in gone)
    if len(kept) == len(example.candidates):
        return example
    return replace(example, candidates=kept)
