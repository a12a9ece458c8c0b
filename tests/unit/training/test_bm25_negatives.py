"""Hard negatives that BM25 finds among a data set's texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memshare.cli import main
from memshare.records import Candidate
from memshare.training.examples import held_out_dir, read_examples
from memshare.training.imported import import_examples

ROWS = [
    {"query": "how is bread baked", "pos": ["bread is baked hot"], "neg": ["iron"]},
    {"query": "How is bread  baked", "pos": ["flour makes bread"]},  # the same question
    {"query": "how is iron cast", "pos": ["iron is cast hot"]},
    {"query": "who paints", "pos": ["bread feeds painters"]},
    {"query": "bread of rye", "pos": ["how is bread baked"]},  # a text that is a question, too
]


def made(tmp_path: Path, rows: list[dict[str, list[str]]], **how: object) -> Path:
    file = tmp_path / "f.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    import_examples(file, tmp_path / "made", "p", **how)  # type: ignore[arg-type]
    return tmp_path / "made"


def negatives(candidates: tuple[Candidate, ...]) -> list[str]:
    return [one.text for one in candidates if one.loglik is not None and one.loglik < 0]


def test_what_nobody_named_fills_up_what_is_there(tmp_path: Path) -> None:
    bread, again, iron, _, _ = read_examples(made(tmp_path, ROWS, negatives=2))  # type: ignore[arg-type]
    # Its own first; then what shares most words, but no answer to the question, and not itself.
    assert negatives(bread.candidates) == ["iron", "iron is cast hot"]
    assert set(negatives(again.candidates)) == {"iron is cast hot", "bread feeds painters"}
    assert negatives(iron.candidates) == ["how is bread baked", "iron"]
    assert [one.bm25_rank for one in iron.candidates] == [None, 0, 1]
    assert all(example.exhaustive for example in (bread, again, iron))


def test_a_found_one_is_worth_as_little_as_the_worst(tmp_path: Path) -> None:
    row = {"query": "bread", "pos": ["warm bread"], "neg": ["cold bread", "old bread"],
           "pos_scores": [9.0], "neg_scores": [7.0, 1.5]}  # fmt: skip
    other = {"query": "cheese", "pos": ["cheese on bread"]}
    one, two = read_examples(made(tmp_path, [row, other], negatives=3))  # type: ignore[list-item]
    assert [c.loglik for c in one.candidates] == [0.0, -2.0, -7.5, -7.5]
    assert [c.loglik for c in two.candidates] == [0.0, -1.0, -1.0, -1.0]


def test_held_out_texts_are_found_and_held_out_queries_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"query": f"word{i} asked", "pos": [f"word{i + 1} told"]} for i in range(60)]
    file = tmp_path / "f.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    ways = ["--held-out", "0.3", "--bm25-negatives", "1"]
    assert main(["examples", "import", str(file), str(tmp_path / "made"), *ways]) == 0
    train = list(read_examples(tmp_path / "made"))
    said = capsys.readouterr().err
    found = {example.query: negatives(example.candidates) for example in train}
    assert f"BM25 found {sum(map(len, found.values()))} negatives for {len(train)} examp" in said
    # The text with a query's word is another row's answer, be that row held out or not.
    assert all(
        texts == [f"{query.split()[0]} told"]
        for query, texts in found.items()
        if "word0 " not in query
    )
    held_out = list(read_examples(held_out_dir(tmp_path / "made")))
    assert len(held_out) > 5 and all(len(example.candidates) == 1 for example in held_out)
