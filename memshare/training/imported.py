"""Training examples from elsewhere: queries with texts that answer them and texts that do not.

Rows ``{"query": str, "pos": [str, ...], "neg": [str, ...]}``, the form of FlagEmbedding and many
published retrieval sets; `foreign` reads others so. They become a folder of examples as mining
writes it, with given labels: every ``pos`` is a positive, and every ``neg`` a hard negative, the
first ones first. A text is what the encoder reads of a memory. ``pos_scores`` and ``neg_scores``, a
number a text, are what a teacher (a cross-encoder, say) thinks of them: they are distilled with
``training.distill_weight``, and of more than ``training.positives`` the best are taken. Other keys
are ignored, which is told, as it is of ``prompt``, an instruction of the query's own.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    FiniteFloat,
    ValidationError,
    model_validator,
)

from memshare.config import BM25Config
from memshare.pool.errors import TransferError
from memshare.pool.readers import BadRow
from memshare.progress import log, track
from memshare.records import DATA_SET, Candidate, Example, answer_key, normalise
from memshare.training import foreign
from memshare.training.bm25_negatives import add_negatives
from memshare.training.examples import (
    MARKER,
    held_out_dir,
    shard_path,
    write_marker,
    write_shard,
)
from memshare.training.shard import ExamplesError

SHARD = 10_000  # examples
_BELOW = -1e-6  # zero


def _usable(text: str) -> str:
    if not text.strip():
        raise ValueError("an empty text")
    text.encode()  # Parquet has UTF-8 alone; its error is a ValueError
    return text


Text = Annotated[str, AfterValidator(_usable)]


class Row(BaseModel):
    """One line of the file."""

    query: Text
    pos: Annotated[tuple[Text, ...], Field(min_length=1)]
    neg: tuple[Text, ...] = ()
    pos_scores: tuple[FiniteFloat, ...] | None = None
    neg_scores: tuple[FiniteFloat, ...] | None = None
    prompt: object = None

    @model_validator(mode="after")
    def _a_score_each(self) -> Self:
        if self.pos_scores is None and self.neg_scores is None:
            return self
        for name in ("pos", "neg"):
            texts, scores = getattr(self, name), getattr(self, f"{name}_scores") or ()
            if len(scores) != len(texts):
                raise ValueError(f"{len(texts)} {name}, {len(scores)} {name}_scores")
        return self

    def labelled(self) -> list[tuple[str, float]]:
        """Each text and its label: 0 or more for positives, less for negatives.

        A teacher's scores are moved so that its worst positive has 0, which is nothing to
        distillation; a negative that it likes as much has all but that.
        """
        good, bad = self.pos_scores or (0.0,) * len(self.pos), self.neg_scores
        zero = min(good)
        worse = (-1.0,) * len(self.neg) if bad is None else [min(x - zero, _BELOW) for x in bad]
        labels = [*(x - zero for x in good), *worse]
        return list(zip((*self.pos, *self.neg), labels, strict=True))


def import_examples(
    source: str | Path,
    folder: Path,
    pool: str,
    split: str = "train",
    subset: str | None = None,
    held_out: float = 0.0,
    negatives: int = 0,
) -> tuple[int, int]:
    """Write the rows of ``source`` (`foreign.read_rows`) as a finished round of examples.

    ``pool`` is the data set's name: negatives within a batch come from one pool alone. A share
    ``held_out`` of the queries, by a hash of what is asked, goes into the folder that evaluates.
    ``negatives``: each of the others has as many, where BM25 finds them (`bm25_negatives`). Returns
    how many train and how many are held out. Of a file not more than a shard of either is in
    memory, but for BM25. Raises `ExamplesError` naming the line that can't be used, or where
    ``folder`` has examples already.
    """
    train, evaluate = _Folder(folder), _Folder(held_out_dir(folder))
    prompts, unread = Counter[str](), dict[str, None]()
    for example in _examples(str(source), pool, split, subset, prompts, unread):
        (evaluate if _drawn(example.query) < held_out else train).add(example)
    if not train.count:
        why = f"all {evaluate.count} rows would be held out" if evaluate.count else "has no rows"
        raise ExamplesError(f"{source}: {why}")
    shards, beside = train.close(), evaluate.close()
    if negatives:
        added = add_negatives(shards, beside, negatives, BM25Config())
        log(f"BM25 found {added} negatives for {train.count} examples")
    if evaluate.count:
        evaluate.finish()  # before the round that it is part of
    train.finish()
    if unread:
        names = ", ".join(unread)
        log(f"not read of the rows: {names} (negatives are neg, or negative, negative_1)")
    if prompts:
        often, _ = prompts.most_common(1)[0]
        log(
            f"{prompts.total()} rows have a prompt, which no query is given: what comes before "
            f"every query is encoder.query_prefix, such as {often!r}"
        )
    return train.count, evaluate.count


class _Folder:
    """A folder of examples that is filled shard by shard."""

    def __init__(self, path: Path) -> None:
        if (path / MARKER).exists():
            raise ExamplesError(f"{path}: has examples already; give another folder")
        self._path, self._rows, self._shards, self.count = path, list[Example](), 0, 0

    def add(self, example: Example) -> None:
        self._rows.append(example)
        self.count += 1
        if len(self._rows) == SHARD:
            self._write()

    def _write(self) -> None:
        self._path.mkdir(parents=True, exist_ok=True)
        write_shard(shard_path(self._path, self._shards), self._rows)
        self._rows, self._shards = [], self._shards + 1

    def close(self) -> list[Path]:
        """Its shards, all of them on disk."""
        if self._rows:
            self._write()
        return [shard_path(self._path, number) for number in range(self._shards)]

    def finish(self) -> None:
        """What is in it counts from here on."""
        told = {"round": 1, "shards": self._shards, "examples": self.count, "labels": "given"}
        write_marker(self._path, told)


def _drawn(query: str) -> float:
    """A number in 0..1 that is the same for all rows that ask the same."""
    digest = hashlib.sha256(normalise(query).encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def _examples(
    source: str, pool: str, split: str, subset: str | None, prompts: Counter[str],
    unread: dict[str, None],
) -> Iterator[Example]:  # fmt: skip
    """``prompts`` and ``unread``, names of keys in order, are filled with what is met."""
    rows = foreign.read_rows(source, split, subset)
    try:
        for line, found in track(rows, f"importing {Path(source).name}"):
            if isinstance(found, BadRow):
                raise ExamplesError(f"{source}:{line}: {found.reason}")
            try:
                row = Row.model_validate(found)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, first["loc"])) or "the row"
                raise ExamplesError(f"{source}:{line}: {where}: {first['msg']}") from None
            assert isinstance(found, Mapping)  # or it were no row
            unread |= dict.fromkeys(str(key) for key in found if key not in Row.model_fields)
            if row.prompt:
                prompts[str(row.prompt)] += 1
            yield _example(row, line, pool)
    except TransferError as error:
        raise ExamplesError(str(error)) from error


def _example(row: Row, line: int, pool: str) -> Example:
    return Example(
        query_id=_id(pool, str(line), row.query, *row.pos),  # a query may come in several rows
        query=row.query,
        answer="",
        pool=pool,
        principal=None,
        round=1,
        seq=line,
        scorer=DATA_SET,
        labels="given",
        baseline_loglik=None,
        candidates=tuple(
            Candidate(_id(text), text, None, label, answer_key(text))
            for text, label in row.labelled()
        ),
    )


def _id(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
