"""The journal of continual training: steps, iterations, and what it says after a crash."""

from __future__ import annotations

from pathlib import Path

import pytest

from memshare.training.journal import Journal, JournalError, Round, Span


def test_a_round_goes_through_its_steps(tmp_path: Path) -> None:
    path = tmp_path / "continual.json"
    assert Journal.load(path) == Journal()
    journal = Journal().begin(Round(1, {"one": Span(0, 9)}, "frozen"))
    for step, following in (("mine", "train"), ("train", "index")):
        assert journal.open_round is not None and journal.open_round.step == step
        journal = journal.advance({"did": step})
        assert journal.open_round is not None and journal.open_round.step == following
        journal.save(path)
        assert Journal.load(path) == journal
    with pytest.raises(JournalError, match="not done"):
        journal.begin(Round(2, {}, "frozen"))
    journal = journal.advance({"generation": 4}, outcome="published")
    assert journal.open_round is None
    with pytest.raises(JournalError, match="no round"):
        journal.advance({})
    journal = journal.begin(Round(5, {"two": Span(0, 3), "one": Span(9, 11)}, "x"))
    assert journal.positions == {"one": 11, "two": 3}
    journal = journal.advance({}, outcome="empty")  # ends the round at any step
    journal.save(path)
    assert Journal.load(path).rounds[1].outcome == "empty"
    assert journal.published_by(4) == journal.rounds[0]
    assert journal.published_by(5) is None
    journal = journal.begin(Round(6, {}, "frozen", step="index"))
    journal = journal.advance({"generation": 4}, outcome="published")  # of another retriever's
    assert journal.published_by(4) == journal.rounds[2]


def test_two_iterations_mine_and_train_twice(tmp_path: Path) -> None:
    path = tmp_path / "continual.json"
    journal = Journal().begin(Round(1, {}, "frozen", iterations=2, warm="runs/training/000000"))
    names = []
    while (now := journal.open_round) is not None:
        names.append((now.name, now.step, now.iteration))
        journal.save(path)
        assert Journal.load(path) == journal
        result = {"number": len(names)}
        journal = journal.advance(result, outcome="published" if now.step == "index" else None)
    assert names == [
        ("mine-1", "mine", 1), ("train-1", "train", 1),
        ("mine", "mine", 2), ("train", "train", 2), ("index", "index", 2),
    ]  # fmt: skip
    (done,) = journal.rounds
    assert {name: row["number"] for name, row in done.results.items()} == {
        "mine-1": 1, "train-1": 2, "mine": 3, "train": 4, "index": 5,
    }  # fmt: skip


def test_a_journal_of_before_there_were_iterations_is_read(tmp_path: Path) -> None:
    path = tmp_path / "continual.json"
    path.write_text(
        '{"rounds": [{"number": 1, "spans": {"one": {"since": 0, "until": 3}}, "encoder": "e",'
        ' "step": "train", "outcome": null, "results": {"mine": {}}}]}'
    )
    now = Journal.load(path).open_round
    assert now is not None and (now.name, now.iterations, now.warm) == ("train", 1, None)


LATER = '{"rounds": [{"number": 1, "spans": {}, "encoder": "e", "what_later_ones_have": 1}]}'


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"rounds": [{"step": "mine"}]}', '{"rounds": 3}', LATER]
)
def test_a_damaged_journal_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "continual.json"
    path.write_text(text)
    with pytest.raises(JournalError, match=r"continual\.json: .*damaged, or of another version"):
        Journal.load(path)
