"""Of held-out memories nothing reaches the training whose encoders they judge."""

from __future__ import annotations

from dataclasses import replace

import quality_domains

from memshare.config import TrainingConfig
from memshare.records import Memory
from tests.training_data import candidate, example


def memory(id_: str, prompt: str) -> Memory:
    return Memory(id_, "p", prompt, "an answer", None, None, None, "", {}, 0)


def test_folds_share_out_all_memories_and_keep_near_duplicates_together() -> None:
    long = "one two three four five six seven eight nine ten eleven twelve"
    memories = [memory(str(n), f"question number {n} about {n * n}") for n in range(21)]
    memories += [memory("near", long), memory("nearer", f"{long} thirteen")]
    made = quality_domains.folds(memories, 5, seed=0, least=0.8)
    assert sorted(m.id for fold in made for m in fold) == sorted(m.id for m in memories)
    assert {len(fold) for fold in made} <= {4, 5, 6}
    (fold,) = (fold for fold in made if any(m.id == "near" for m in fold))
    assert any(m.id == "nearer" for m in fold)
    assert made == quality_domains.folds(memories, 5, seed=0, least=0.8)
    assert made != quality_domains.folds(memories, 5, seed=1, least=0.8)


def test_what_is_held_out_is_no_query_no_positive_and_no_negative() -> None:
    found = (
        candidate("best", "best", -0.1), candidate("good", "good", -0.2),
        candidate("bad", "bad", -3.0), candidate("worst", "worst", -4.0),
    )  # fmt: skip
    made = [replace(example(name, candidates=found), baseline_loglik=-1.0) for name in ("a", "b")]
    training = TrainingConfig(positives=2, hard_negatives=1)

    def chosen(without: set[str]) -> list[tuple[str, list[str], list[str]]]:
        items = quality_domains.usable(made, training, without)
        return [(i.query_id, [p.id for p in i.positives], [n.id for n in i.negatives])
                for i in items]  # fmt: skip

    assert chosen(set()) == [(q, ["best", "good"], ["worst"]) for q in "ab"]
    assert chosen({"a", "best", "worst"}) == [("b", ["good"], ["bad"])]
    assert not chosen({"bad", "worst"})  # without a hard negative the peer can't use it
