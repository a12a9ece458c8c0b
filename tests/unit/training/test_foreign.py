"""Labelled texts in the forms in which others publish them."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memshare.cli import main
from memshare.progress import log_through
from memshare.records import Example
from memshare.training.examples import read_training
from memshare.training.imported import import_examples
from memshare.training.shard import ExamplesError

ROWS: list[dict[str, Any]] = [
    {"anchor": "q1", "positive": "p1", "negative": "n1"},
    {"anchor": 'q "2"', "positive": "p2\twith a tab,\nand a line", "negative": "n2"},
]
WANTED = [("q1", ["p1"], ["n1"]), ('q "2"', ["p2\twith a tab,\nand a line"], ["n2"])]


def read(source: Path, **how: Any) -> list[Example]:
    made = source.with_name("made")
    import_examples(source, made, "p", **how)
    return list(read_training([made]))


def texts(found: list[Example]) -> list[tuple[str, list[str], list[str]]]:
    def part(one: Example, good: bool) -> list[str]:
        return [c.text for c in one.candidates if (c.loglik is not None and c.loglik >= 0) == good]

    return [(one.query, part(one, True), part(one, False)) for one in found]


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "name", ["f.jsonl", "f.csv", "f.tsv", "f.parquet", "f.csv.gz", "f.json.gz"]
)
def test_columns_of_sentence_transformers_in_any_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name.removesuffix(".gz")
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as handle:
            writer = csv.DictWriter(handle, list(ROWS[0]), delimiter=",\t"[path.suffix == ".tsv"])
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        jsonl(path, *ROWS)
    if name.endswith(".gz"):
        packed = tmp_path / name
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path = packed
    assert texts(read(path)) == WANTED


def test_data_sets(tmp_path: Path) -> None:
    """As `datasets` saves them, one or by splits, and as a folder of its files."""
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one" / "saved")
    assert texts(read(tmp_path / "one" / "saved")) == WANTED
    splits = datasets.DatasetDict({"train": data.select([1]), "dev": data})
    splits.save_to_disk(tmp_path / "saved")
    assert texts(read(tmp_path / "saved", split="dev")) == WANTED
    folder = tmp_path / "files" / "some"
    folder.mkdir(parents=True)
    data.to_parquet(folder / "train.parquet")
    assert texts(read(folder)) == WANTED
    with pytest.raises(
        ExamplesError, match="split no: can't be read: it has the splits train, dev"
    ):
        import_examples(tmp_path / "saved", tmp_path / "none", "p", split="no")


def test_negatives_are_in_their_columns_order_and_may_be_fewer(tmp_path: Path) -> None:
    many = {f"negative_{i}": f"n{i}" for i in (10, 2, 1)}
    rows = [
        {"query": "q", "answer": "a", **many, "id": 7},
        {"question": "r", "positive": ["a", "b"], "negative_1": None, "negative_2": ""},
        {"query": "s", "pos": ["a"], "neg": ["n"], "score": 0.5, "type": "normal"},
        {
            "query_id": "7", "query": "t", "answers": [],
            "positive_passages": [{"docid": "1", "title": "A", "text": "about a"}],
            "negative_passages": [{"docid": "2", "text": "about b"}, {"title": "", "text": "c"}],
        },
    ]  # fmt: skip
    assert texts(read(jsonl(tmp_path / "f", *rows))) == [
        ("q", ["a"], ["n1", "n2", "n10"]),
        ("r", ["a", "b"], []),
        ("s", ["a"], ["n"]),
        ("t", ["A about a"], ["about b", "c"]),
    ]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (
            {"sentence1": "a", "sentence2": "b"},
            "2: has no positive or answer or positive_passages, only sent",
        ),
        ({"text": "a", "answer": "b"}, "2: has no query or anchor or question, only text, answer"),
        ({"query": "a", "anchor": "b", "answer": "c"}, "2: has query and anchor, and one of them"),
        ({"query": "a", "answer": "b", "label": 0}, "2: what label says of a row is not known"),
        ({"query": "a", "positive": "b", "negative": "c", "score": 2.0}, "2: what score says"),
        ({"query": "a", "positive": ""}, "2: pos: .*at least 1"),
        ({"query": "a", "positive": 3}, "2: pos.0: .*string"),
    ],
)
def test_rows_that_could_mean_something_else_are_refused(
    tmp_path: Path, row: Any, told: str
) -> None:
    with pytest.raises(ExamplesError, match=rf"f:{told}"):
        read(jsonl(tmp_path / "f", ROWS[0], row))


def test_prompts_that_no_query_is_given_are_told(tmp_path: Path) -> None:
    row = {"query": "q", "pos": ["p"], "neg": ["n"], "prompt": "Represent this: "}
    said: list[str] = []
    log_through(said.append)
    try:
        found = read(jsonl(tmp_path / "f", row, row, {**row, "prompt": ""}))
    finally:
        from memshare.progress import _plain

        log_through(_plain)
    assert [one.query for one in found] == ["q"] * 3
    (told,) = [line for line in said if "prompt" in line]
    assert told.startswith("2 rows have a prompt") and "'Represent this: '" in told


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    jsonl(folder / "queries.jsonl", {"_id": "1", "text": "q1"}, {"_id": "2", "text": "q2"})
    jsonl(
        folder / "corpus.jsonl",
        {"_id": "a", "title": "A", "text": "about a", "metadata": {}},
        {"_id": "b", "title": "", "text": "about b"},
        {"_id": "c", "text": "about c"},
        {"_id": "d", "text": "nobody judged it"},
    )
    lines = ["query-id\tcorpus-id\tscore", "1\ta\t2", "1\tb\t1", "1\tc\t0", "2\tb\t0"]
    (folder / "qrels" / "train.tsv").write_text("\n".join(lines))
    (folder / "qrels" / "test.tsv").write_text("\n".join([lines[0], "2\tc\t1"]))
    return folder


def test_a_folder_of_beir(beir: Path) -> None:
    (one,) = read(beir)  # the other query has nothing that answers it
    assert [(c.text, c.loglik) for c in one.candidates] == [
        ("A about a", 1.0), ("about b", 0.0), ("about c", -1.0),
    ]  # fmt: skip


def test_a_split_of_beir_and_packed_texts(beir: Path, tmp_path: Path) -> None:
    corpus = beir / "corpus.jsonl"
    (beir / "corpus.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes()))
    corpus.unlink()
    assert main(["examples", "import", str(beir), str(tmp_path / "x"), "--split", "test"]) == 0
    assert texts(list(read_training([tmp_path / "x"]))) == [("q2", ["about c"], [])]


def test_folders_that_are_refused(beir: Path, tmp_path: Path) -> None:
    with pytest.raises(ExamplesError, match=r"dev\.tsv: is not there; --split may be test, train"):
        read(beir, split="dev")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExamplesError, match="empty, split train: can't be read"):
        read(tmp_path / "empty")
    (tmp_path / "half" / "qrels").mkdir(parents=True)
    with pytest.raises(ExamplesError, match="half: no folder of BEIR's, which has corpus"):
        read(tmp_path / "half")
    judged = beir / "qrels" / "train.tsv"
    whole = judged.read_text()
    for line, told in (
        ("1\tz\t1", r"corpus\.jsonl lacks z, which qrels/train\.tsv names"),
        ("9\ta\t1", r"queries\.jsonl lacks 9"),
        ("1\ta\tmuch", r"train\.tsv:6: could not convert"),
        ("1\ta", r"train\.tsv:6: 2 columns, but the header has 3"),
    ):
        judged.write_text(f"{whole}\n{line}")
        with pytest.raises(ExamplesError, match=told):
            read(beir)
    judged.write_text("1 0 a 1\n1 0 b 1")
    with pytest.raises(ExamplesError, match=r"train\.tsv:2: 'query-id'; wanted: query-id, corpus"):
        read(beir)
    judged.write_text(whole)
    jsonl(beir / "corpus.jsonl", {"id": "a", "contents": "x"})
    with pytest.raises(ExamplesError, match=r"corpus\.jsonl:1: wanted: _id, text"):
        read(beir)


def test_files_that_are_refused(tmp_path: Path) -> None:
    torn = tmp_path / "f.jsonl.gz"
    torn.write_bytes(gzip.compress(b"".join(json.dumps(row).encode() for row in ROWS))[:-12])
    for packed in (torn.read_bytes(), b"{}"):
        torn.write_bytes(packed)
        with pytest.raises(ExamplesError, match=r"f\.jsonl\.gz: no whole gzip file"):
            read(torn)
    for one_list in ('[{"query": "q", "pos": ["p"]}]', '[\n{"query": "q", "pos": ["p"]}\n]'):
        (tmp_path / "f.json").write_text(one_list)
        with pytest.raises(ExamplesError, match=r"f\.json:1: .*; one JSON object a line is wanted"):
            read(tmp_path / "f.json")
    (tmp_path / "f.parquet").write_bytes(b"PAR1")
    with pytest.raises(ExamplesError, match=r"f\.parquet: can't be read as Parquet"):
        read(tmp_path / "f.parquet")
    (tmp_path / "f.csv").write_text("query,answer,query\na,b,c\n")
    with pytest.raises(ExamplesError, match="two columns have one name: query, answer, query"):
        read(tmp_path / "f.csv")
