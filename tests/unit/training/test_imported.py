"""Labelled texts from elsewhere, as training examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memshare.cli import main
from memshare.config import TrainingConfig
from memshare.training import imported
from memshare.training.examples import (
    held_out_dir,
    read_examples,
    read_training,
    shard_path,
)
from memshare.training.imported import import_examples
from memshare.training.relevance import mined_gains
from memshare.training.select import Selected, select
from memshare.training.shard import ExamplesError


def written(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def selected(folder: Path, **settings: Any) -> list[Selected]:
    return list(select(read_training([folder]), TrainingConfig(**settings)).items)


ROWS = [
    {"query": "how do I bake bread?", "pos": ["flour, water, heat", "a recipe"], "neg": ["iron"]},
    {"query": "how do I bake bread?", "pos": ["sourdough"], "neg": ["rust", "iron"], "id": 7},
    {"query": "wer dichtet?", "pos": ["春眠不觉晓"]},
]


def test_every_row_is_a_query_with_its_own_labels(tmp_path: Path) -> None:
    assert import_examples(written(tmp_path / "f.jsonl", *ROWS), tmp_path / "made", "bread") == (
        3,
        0,
    )
    first, second, third = selected(tmp_path / "made", positives=4, hard_negatives=1)
    assert [p.text for p in first.positives] == ["flour, water, heat", "a recipe"]
    assert [p.text for p in first.negatives] == ["iron"]
    assert [p.text for p in second.negatives] == ["rust"]  # the first of its own is the hardest
    assert (third.query, third.negatives, third.pool) == ("wer dichtet?", (), "bread")
    assert first.prompt == second.prompt and first.query_id != second.query_id


def test_positives_that_are_not_learned_from_are_told(tmp_path: Path) -> None:
    import_examples(written(tmp_path / "f.jsonl", *ROWS), tmp_path / "made", "bread")
    told = [
        str(select(read_training([tmp_path / "made"]), TrainingConfig(positives=count)))
        for count in (1, 2)
    ]
    assert "; of 1 not all positives are learned from (see training.positives" in told[0]
    assert "learned from" not in told[1]


def test_a_teachers_scores_choose_positives_and_are_there_to_distil(tmp_path: Path) -> None:
    row = {"query": "q", "pos": ["fair", "good"], "neg": ["near", "far"],
           "pos_scores": [2, 5.0], "neg_scores": [4.5, -3]}  # fmt: skip
    made = tmp_path / "made"
    import_examples(written(tmp_path / "f.jsonl", row), made, "p")
    (both,) = selected(made, positives=2, hard_negatives=2)
    assert [(p.text, p.loglik) for p in both.positives] == [("good", 3.0), ("fair", 0.0)]
    # Negatives stay negatives, in the row's order, whatever the teacher thinks of them.
    assert [(p.text, p.loglik) for p in both.negatives] == [("near", -1e-6), ("far", -5.0)]
    (one,) = selected(made, positives=1, hard_negatives=3)
    assert [p.text for p in one.positives] == ["good"]
    assert [p.text for p in one.negatives] == ["near", "far"]  # the other positive is none of them
    (example,) = read_training([made])
    assert mined_gains(example, example.candidates) == [1.0, 1.0, 0.0, 0.0]


def test_rows_whose_positive_is_the_query_are_told_as_such(tmp_path: Path) -> None:
    rows = [{"query": "a", "pos": [" A"]}, {"query": "b", "pos": ["b"], "neg": ["c"]}, ROWS[0]]
    import_examples(written(tmp_path / "f.jsonl", *rows), tmp_path / "made", "p")
    made = select(read_training([tmp_path / "made"]), TrainingConfig())
    assert made.dropped == {"their positive is the query itself": 2} and len(made.items) == 1


def test_labels_without_a_teacher_are_not_distilled(tmp_path: Path) -> None:
    """They are 0 and -1, which a teacher that hardly knows would say of them."""
    bare = {"query": "q", "pos": ["good"], "neg": ["far", "near"]}
    scored = {**bare, "query": "r", "pos_scores": [3.0], "neg_scores": [1, 2.5]}
    told = []
    for name, rows in (("bare", [bare]), ("mixed", [bare, scored])):
        import_examples(written(tmp_path / f"{name}.jsonl", *rows), tmp_path / name, "p")
        made = select(read_training([tmp_path / name]), TrainingConfig(distill_weight=1.0))
        told.append("warning: training.distill_weight does nothing" in str(made))
    assert told == [True, False]
    first, second = selected(tmp_path / "mixed", distill_weight=1.0)
    assert [p.loglik for p in (*first.positives, *first.negatives)] == [None, None, None]
    assert [p.text for p in first.negatives] == ["far", "near"]
    assert [p.loglik for p in (*second.positives, *second.negatives)] == [0.0, -2.0, -0.5]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"query": "q", "pos": ["p"], "negs": ["n"], "id": 7}, "rows: negs, id (negatives are neg"),
        ({"anchor": "q", "positive": "p", "negatives": ["n"]}, "rows: negatives (negatives are"),
        ({"query": "q", "answer": "p", "negative": "n", "prompt": "to: "}, "'to: '"),
    ],
)
def test_what_is_not_read_of_a_row_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: dict[str, Any], told: str
) -> None:
    """Negatives by another name would be passed over, and nothing would tell."""
    import_examples(written(tmp_path / "f.jsonl", row, row), tmp_path / "made", "p")
    said = capsys.readouterr().err
    assert said.count(told) == 1 and ("not read" in said) == ("prompt" not in row)


def test_negatives_beside_a_positive_may_be_a_list_by_our_name(tmp_path: Path) -> None:
    row = {"query": "q", "positive": "p", "neg": ["n", "m"]}
    import_examples(written(tmp_path / "f.jsonl", row), tmp_path / "made", "p")
    assert [p.text for p in selected(tmp_path / "made")[0].negatives] == ["n", "m"]


def test_shards_hold_all_rows_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imported, "SHARD", 2)
    rows = [{"query": f"q{i}", "pos": [f"p{i}"], "neg": ["n"]} for i in range(5)]
    made = tmp_path / "made"
    assert main(["examples", "import", str(written(tmp_path / "f", *rows)), str(made)]) == 0
    assert shard_path(made, 2).exists() and not shard_path(made, 3).exists()
    assert [item.query for item in selected(made)] == [row["query"] for row in rows]


def test_a_share_of_the_queries_is_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(imported, "SHARD", 50)
    rows = [{"query": f"q{i}", "pos": [f"p{i}"]} for i in range(400)]
    rows += [{"query": f" Q{i} ", "pos": [f"another {i}"]} for i in range(400)]  # asked again
    file, made = str(written(tmp_path / "f", *rows)), tmp_path / "made"
    assert main(["examples", "import", file, str(made), "--held-out", "0.25"]) == 0
    train = [example.query.strip().lower() for example in read_examples(made)]
    held_out = [example.query.strip().lower() for example in read_examples(held_out_dir(made))]
    assert (
        f"{len(train)} examples in {made}, and {len(held_out)} held out" in capsys.readouterr().out
    )
    assert len(train) + len(held_out) == 800 and 70 * 2 < len(held_out) < 130 * 2
    assert not set(train) & set(held_out)
    assert main(["examples", "import", file, str(tmp_path / "few"), "--held-out", "0.001"]) == 0
    assert not held_out_dir(tmp_path / "few").exists() and ", and 0 held" in capsys.readouterr().out
    with pytest.raises(ExamplesError, match="all 1 rows would be held out"):
        import_examples(written(tmp_path / "one", ROWS[2]), tmp_path / "no", "p", held_out=0.999)
    with pytest.raises(SystemExit):
        main(["examples", "import", file, str(tmp_path / "no"), "--held-out", "1"])
    assert "1 is no share" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"query": " ", "pos": ["p"]}, r"f\.jsonl:2: query: .*empty text"),
        ({"query": "q", "pos": []}, r"f\.jsonl:2: pos: .*at least 1"),
        ({"query": "q", "pos": "p"}, r"f\.jsonl:2: pos: .*tuple"),
        ({"query": "q", "pos": ["p"], "neg": [None]}, r"f\.jsonl:2: neg\.0: .*string"),
        ({"pos": ["p"]}, r"f\.jsonl:2: query: Field required"),
        ({"query": "\ud800", "pos": ["p"]}, r"f\.jsonl:2: query: "),
        (["q", "p"], r"f\.jsonl:2: the row: "),
        ({"query": "q", "pos": ["p"], "pos_scores": [1, 2]}, r"f\.jsonl:2: .*1 pos, 2 pos_scores"),
        ({"query": "q", "pos": ["p"], "neg": ["n"], "pos_scores": [1]}, "1 neg, 0 neg_scores"),
        ({"query": "q", "pos": ["p"], "pos_scores": ["nan"]}, r"pos_scores\.0: .*finite"),
    ],
)
def test_a_bad_row_is_named_and_nothing_passes_for_whole(
    tmp_path: Path, row: Any, told: str
) -> None:
    made = tmp_path / "made"
    with pytest.raises(ExamplesError, match=told):
        import_examples(written(tmp_path / "f.jsonl", ROWS[0], row), made, "p")
    with pytest.raises(ExamplesError, match="no finished round"):
        selected(made)
    assert import_examples(written(tmp_path / "f.jsonl", ROWS[0]), made, "p") == (1, 0)  # and again


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, file = tmp_path / "made", written(tmp_path / "f", *ROWS)
    with pytest.raises(ExamplesError, match="has no rows"):
        import_examples(written(tmp_path / "empty"), made, "p")
    (tmp_path / "torn").write_text('{"query": "q", "pos": ["p"')
    with pytest.raises(ExamplesError, match="torn:1: bad JSON"):
        import_examples(tmp_path / "torn", made, "p")
    import_examples(file, made, "p")
    assert main(["examples", "import", str(file), str(made)]) == 2
    assert "has examples already" in capsys.readouterr().err
    for absent, told in {
        "absent.jsonl": "absent.jsonl: can't be read",
        "absent": "absent, split train: can't be read",
    }.items():
        assert main(["examples", "import", str(tmp_path / absent), str(tmp_path / "other")]) == 2
        assert told in capsys.readouterr().err
