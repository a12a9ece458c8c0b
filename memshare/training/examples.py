"""Training examples on disk: Parquet shards, one folder a round, whole once its marker stands.

``examples/000003/shard-00000.parquet, ..., round.json``. Every scored candidate is kept; positives
and negatives are chosen when training. Held-out memories, mined for the evaluation while training,
are in a folder ``held_out`` of the same form inside the round's, where nothing that reads a round
finds them: they are never trained on. The shards carry the features of `datasets`, so that
``datasets.load_dataset("parquet", data_files=...)`` reads them too; here they are read straight
from the file, since a cache elsewhere would outlive the deletion of a memory.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from memshare.files import write_atomic, write_json
from memshare.records import Candidate, Example
from memshare.training.iterations import iteration_dir, iteration_dirs
from memshare.training.shard import ExamplesError, read_table

MARKER = "round.json"
HELD_OUT = "held_out"

_CANDIDATE = {
    "id": "string",
    "text": "string",
    "bm25_rank": "int64",
    "loglik": "float64",
    "answer_key": "string",
    "dense_rank": "int64",
    "prompt_key": "string",
    "principal": "string",
    "label_key": "string",
}
_QUERY = {
    "query_id": "string",
    "query": "string",
    "answer": "string",
    "pool": "string",
    "principal": "string",
    "round": "int64",
    "seq": "int64",
    "scorer": "string",
    "labels": "string",
    "baseline_loglik": "float64",
}


def _schema() -> pa.Schema:
    """What ``Features.arrow_schema`` of `datasets` is, which takes seconds to import.

    Every program of the loop reads or writes shards; none of them needs a data set.
    """
    types = {"string": pa.string(), "int64": pa.int64(), "float64": pa.float64()}
    values = {name: {"dtype": dtype, "_type": "Value"} for name, dtype in _CANDIDATE.items()}
    features = {
        **{name: {"dtype": dtype, "_type": "Value"} for name, dtype in _QUERY.items()},
        "candidates": {"feature": values, "_type": "List"},
    }
    struct = pa.struct([(name, types[dtype]) for name, dtype in _CANDIDATE.items()])
    fields = [(name, types[dtype]) for name, dtype in _QUERY.items()]
    told = json.dumps({"info": {"features": features}})
    return pa.schema([*fields, ("candidates", pa.list_(struct))], {"huggingface": told})


SCHEMA = _schema()


def round_dir(examples_dir: Path, number: int, iteration: int = 1) -> Path:
    """Where an iteration (1, 2, ...) of round ``number`` (1, 2, ...) keeps its examples."""
    return iteration_dir(examples_dir / f"{number:06d}", iteration)


def round_dirs(examples_dir: Path) -> list[Path]:
    """The finished rounds, oldest first."""
    return sorted(path.parent for path in examples_dir.glob(f"[0-9]*/{MARKER}"))


def mined_dirs(folder: Path) -> list[Path]:
    """The finished iterations of the finished round in ``folder``, which is the first of them."""
    return [path for path in iteration_dirs(folder) if (path / MARKER).exists()]


def held_out_dir(folder: Path) -> Path:
    """Where the round in ``folder`` keeps what evaluates, and never trains."""
    return folder / HELD_OUT


def shard_path(folder: Path, index: int) -> Path:
    """File of shard ``index`` (0, 1, ...) of a round."""
    return folder / f"shard-{index:05d}.parquet"


def write_shard(path: Path, examples: Iterable[Example]) -> None:
    """Write one shard, atomically; equal examples give equal bytes."""
    table = pa.Table.from_pylist([asdict(example) for example in examples], schema=SCHEMA)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    write_atomic(path, buffer.getvalue())


def to_example(row: Mapping[str, Any]) -> Example:
    """One row of a shard as a record."""
    candidates = tuple(Candidate(**candidate) for candidate in row["candidates"])
    return Example(**{**row, "candidates": candidates})


def read_shard(path: Path) -> list[Example]:
    """The examples of one shard. Raises `ExamplesError` naming a damaged file."""
    return [to_example(row) for row in read_table(path, SCHEMA).to_pylist()]


def write_marker(folder: Path, marker: Mapping[str, Any]) -> None:
    """Declare a round whole; ``marker`` holds at least ``shards``. Written last."""
    write_json(folder / MARKER, dict(marker))


def read_marker(folder: Path) -> dict[str, Any]:
    """What `write_marker` wrote. Raises `ExamplesError` for an unfinished round."""
    path = folder / MARKER
    try:
        marker = json.loads(path.read_text(encoding="utf-8"))
        int(marker["shards"])
    except FileNotFoundError:
        raise ExamplesError(
            f"{folder}: no finished round of examples; run train/mine.py to finish it"
        ) from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ExamplesError(f"{path}: damaged ({error!r})") from error
    assert isinstance(marker, dict)
    return marker


def is_whole(folder: Path) -> bool:
    """Whether a round has its marker and every shard that the marker counts, held-out ones too."""
    held_out = held_out_dir(folder)
    return (
        (folder / MARKER).exists()
        and all(path.exists() for path in _shards(folder))
        and (not held_out.exists() or is_whole(held_out))
    )


def _shards(folder: Path, count: int | None = None) -> list[Path]:
    count = int(read_marker(folder)["shards"]) if count is None else count
    return [shard_path(folder, index) for index in range(count)]


def read_examples(folder: Path, shards: int | None = None) -> Iterator[Example]:
    """The examples of one round, shard by shard; ``shards``: how many, where no marker says so."""
    for path in _shards(folder, shards):
        yield from read_shard(path)


def read_training(folders: Sequence[Path]) -> Iterator[Example]:
    """The examples of several rounds, one shard in memory at a time.

    Raises `ExamplesError`, also for held-out examples: nothing is ever trained on them.
    """
    for folder in folders:
        if folder.resolve().name == HELD_OUT:
            raise ExamplesError(f"{folder}: held-out examples, which are never trained on")
    return chain.from_iterable(map(read_examples, folders))
