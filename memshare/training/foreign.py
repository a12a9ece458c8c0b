"""Labelled texts as others publish them, read as rows of query, pos and neg.

A file has a row a line, or record: JSON lines, CSV or TSV with a header (each also compressed,
``.gz``), or Parquet. What is no file is a data set of the hub's, or a folder of `datasets`. A row
is in that form (FlagEmbedding's), or has columns as
sentence-transformers' data sets: ``anchor`` (or ``query``, ``question``), ``positive`` (or
``answer``), and ``negative``, ``negative_1`` and so on, where there are any; or it is Tevatron's,
with ``positive_passages`` and ``negative_passages``. A folder is one of BEIR's: ``corpus.jsonl``,
``queries.jsonl`` and ``qrels/SPLIT.tsv``; a query's judgements are its row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from memshare.pool.errors import TransferError
from memshare.pool.readers import BadRow, read_dataset, read_jsonl, read_records

Rows = Iterator[tuple[int, object]]

_QUERIES = ("query", "anchor", "question")
_POSITIVES = ("positive", "answer", "positive_passages")
_NEGATIVE = re.compile(r"neg|negative(_\d+|_passages)?")
# Of a pair, or of a triplet's difference: what they mean, a number can't tell.
_VERDICTS = ("score", "scores", "label", "labels", "similarity")


def read_rows(source: str, split: str, subset: str | None = None) -> Rows:
    """The rows of a file, a folder or a data set, with their numbers. Raises `TransferError`.

    ``split`` is of a folder of BEIR's or a data set, ``subset`` of the latter.
    """
    path = Path(source)
    if (path / "qrels").is_dir() or (path / "corpus.jsonl").is_file():
        return _read_beir(path, split)
    name = path.name.lower().removesuffix(".gz")
    found: Rows
    if name.endswith(".parquet"):
        found = _read_parquet(path)
    elif name.endswith((".csv", ".tsv")):
        found = read_records(path, _distinct, "\t" if name.endswith(".tsv") else ",")
    elif path.is_file() or name.endswith((".jsonl", ".ndjson", ".json")):
        found = _read_lines(path)
    else:
        found = read_dataset(source, _distinct, split, subset)
    return ((number, in_form(row)) for number, row in found)


def in_form(row: object) -> object:
    """A row by the names that we use; one that is in form, or no row at all, as it is."""
    if not isinstance(row, Mapping) or "pos" in row:
        return row
    positives = _one_of(row, _POSITIVES)
    if isinstance(positives, BadRow):
        return positives
    query = _one_of(row, _QUERIES)
    if isinstance(query, BadRow):
        return query
    if verdicts := [name for name in _VERDICTS if name in row]:
        return BadRow(
            f"what {verdicts[0]} says of a row is not known; leave out rows that are not positive, "
            "and the column, or write pos, neg, pos_scores and neg_scores"
        )
    negatives = sorted(filter(_NEGATIVE.fullmatch, row), key=lambda name: (len(name), name))
    texts = [text for name in negatives for text in _texts(row[name])]
    rest = {name: row[name] for name in row if name not in (query, positives, *negatives)}
    return {**rest, "query": row[query], "pos": _texts(row[positives]), "neg": texts}


def _distinct(header: list[str]) -> None:
    if len(set(header)) != len(header):
        raise TransferError(f"two columns have one name: {', '.join(header)}")


def _one_of(row: Mapping[str, Any], names: tuple[str, ...]) -> str | BadRow:
    there = [name for name in names if name in row]
    if len(there) == 1:
        return there[0]
    if there:
        return BadRow(f"has {' and '.join(there)}, and one of them is wanted")
    return BadRow(f"has no {' or '.join(names)}, only {', '.join(map(str, row))}")


def _texts(value: object) -> list[object]:
    """A column's texts: it, or the list that it is; rows with fewer negatives leave some empty."""
    return [_text(one) for one in (value if isinstance(value, list) else [value]) if one]


def _text(passage: object) -> object:
    """A passage with a title as one text, as BEIR's own code reads it; any other as it is."""
    if isinstance(passage, dict) and isinstance(passage.get("text"), str):
        return f"{passage.get('title') or ''} {passage['text']}".strip()
    return passage


def _read_lines(path: Path) -> Rows:
    for number, row in read_jsonl(path):
        if number == 1 and isinstance(row, list | BadRow):  # many a .json is one list
            told = row.reason if isinstance(row, BadRow) else "a list"
            row = BadRow(
                f"{told}; one JSON object a line is wanted, which jq -c '.[]' makes of a list"
            )
        yield number, row


def _read_parquet(path: Path) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        for batch in pq.ParquetFile(path).iter_batches(1000):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (OSError, pa.ArrowException) as error:
        raise TransferError(f"{path}: can't be read as Parquet: {error}") from error


def _read_beir(folder: Path, split: str) -> Rows:
    """One row a query that has a relevant text; texts judged 0 are negatives.

    What is judged is in memory, and no more of the corpus.
    """
    judged = _judgements(folder, split)
    queries = _part(folder, "queries", set(judged))
    corpus = _part(folder, "corpus", {key for found in judged.values() for key in found})
    for number, (query, found) in enumerate(judged.items(), 1):
        good = [key for key, score in found.items() if score > 0]
        bad = [key for key, score in found.items() if score <= 0]
        if not good:
            continue
        lacking = [f"corpus.jsonl lacks {key}" for key in found if key not in corpus]
        if query not in queries:
            lacking = [f"queries.jsonl lacks {query}"]
        if lacking:
            yield number, BadRow(f"{lacking[0]}, which qrels/{split}.tsv names")
            continue
        row: dict[str, object] = {"query": queries[query]}
        for name, keys in (("pos", good), ("neg", bad)):
            row[name] = [corpus[key] for key in keys]
            row[f"{name}_scores"] = [found[key] for key in keys]
        yield number, row


def _judgements(folder: Path, split: str) -> dict[str, dict[str, float]]:
    """Scores by query and text."""
    path = folder / "qrels" / f"{split}.tsv"
    if not path.is_file():
        there = sorted(file.stem for file in (folder / "qrels").glob("*.tsv"))
        if not there:
            raise TransferError(
                f"{folder}: no folder of BEIR's, which has corpus.jsonl, queries.jsonl and "
                "qrels/SPLIT.tsv"
            )
        raise TransferError(f"{path}: is not there; --split may be {', '.join(there)}")
    judged: dict[str, dict[str, float]] = {}
    for number, row in read_records(path, _distinct, "\t"):
        try:
            if isinstance(row, BadRow):
                raise ValueError(row.reason)
            found = judged.setdefault(row["query-id"], {})
            found[row["corpus-id"]] = float(row["score"])
        except (KeyError, ValueError) as error:
            raise TransferError(
                f"{path}:{number}: {error}; wanted: query-id, corpus-id, score"
            ) from None
    return judged


def _part(folder: Path, name: str, wanted: set[str]) -> dict[str, object]:
    """Texts by id, of ``wanted`` alone."""
    path = folder / f"{name}.jsonl"
    if not path.is_file() and path.with_name(f"{path.name}.gz").is_file():
        path = path.with_name(f"{path.name}.gz")
    texts: dict[str, object] = {}
    for number, row in read_jsonl(path):
        if isinstance(row, BadRow):
            raise TransferError(f"{path}:{number}: {row.reason}")
        if not isinstance(row, dict) or not isinstance(row.get("text"), str) or "_id" not in row:
            raise TransferError(f"{path}:{number}: wanted: _id, text, and title if there is one")
        if str(row["_id"]) in wanted:
            texts[str(row["_id"])] = _text(row)
    return texts
