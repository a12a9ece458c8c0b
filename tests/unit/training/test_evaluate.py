"""What held-out examples say of an encoder."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.evaluation import InformationRetrievalEvaluator

from memshare.cli import main
from memshare.config import BM25Config, TrainingConfig, load_config
from memshare.metrics.ir import ir_metrics, mean_metrics
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.text import memory_text
from memshare.training.evaluate import (
    EVALUATED,
    HeldOut,
    evaluate,
    evaluate_bm25,
    read_held_out,
)
from memshare.training.examples import held_out_dir, read_examples
from memshare.training.gather import World
from memshare.training.imported import import_examples
from memshare.training.select import Selected, select
from memshare.training.shard import ExamplesError
from tests.tiny import tiny_encoder
from tests.training_data import TOPICS, candidate, example, examples, write_round

ONE = World(torch.device("cpu"))


class Angles:
    """An encoder whose vectors are given: a text's last word is its angle in degrees."""

    query_prefix, memory_prefix, dim = "q ", "m ", 2

    def encode(self, texts: list[str], side: str) -> np.ndarray:
        assert all(text.startswith(f"{side[0]} ") for text in texts)  # to its own tower
        angles = np.radians([float(text.split()[-1]) for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def measure(held_out: HeldOut) -> dict[str, float]:
    return evaluate(held_out, Angles(), ONE)  # type: ignore[arg-type]


def test_hand_computed() -> None:
    """Two queries: one useful memory found second, and two (grades 1 and 3) found third, first."""
    first = example(
        "first", query="at 0", baseline_loglik=-2.0,
        candidates=(candidate("a", "10", -3.0), candidate("b", "20", -1.0),
                    candidate("c", "30", -1.99)),  # gains: -1, 1, and 0.01, which is too little
    )  # fmt: skip
    second = example(
        "second", query="at 90", baseline_loglik=-2.0,
        candidates=(candidate("x", "50", -1.9), candidate("y", "70", -2.5),
                    candidate("z", "80", -1.0), candidate("u", "60", None)),
    )  # fmt: skip
    held_out = HeldOut.of([first, second], 0.05)
    assert held_out.grades == {
        "first": {"a": 0, "b": 3, "c": 0}, "second": {"x": 1, "y": 0, "z": 3, "u": 0},
    }  # fmt: skip
    # first: a, b, c; second: z, y, u, x, so that its second useful memory is the fourth
    found = (3 + 1 / math.log2(5)) / (3 + 1 / math.log2(3))
    assert measure(held_out) == pytest.approx(
        {
            "P@1": 0.5,
            "MRR@10": (0.5 + 1) / 2,
            "nDCG@10": (1 / math.log2(3) + found) / 2,
            "recall@10": 1.0,
            "recall@1": (0 + 0.5) / 2,
            "recall@3": (1 + 0.5) / 2,
        }
    )


def test_an_evaluation_on_nothing_is_a_warning() -> None:
    some = HeldOut.of(examples(2), 0.05)
    assert str(some).endswith("(0 to which all of theirs are alike, 0 trained on: left out)")
    none = HeldOut.of(examples(2), 99.0)
    assert str(none).startswith("0 held-out queries") and "(2 to which all" in str(none)
    assert "; warning: nothing is evaluated, " in str(none)


def test_beyond_ten_is_not_recalled() -> None:
    row = [candidate(f"c{i:02}", str(i), -1.0 if i in (3, 11) else -9.0) for i in range(12)]
    metrics = measure(HeldOut.of([example(query="0", candidates=tuple(row))], 0.05))
    assert metrics["recall@10"] == 0.5 and metrics["MRR@10"] == pytest.approx(0.25)


def test_equal_similarities_are_no_merit() -> None:
    """An encoder that maps all to one point does not get the order of proposal as its ranking."""
    row = (candidate("a", "a 5", -1.0), candidate("b", "b 5", -9.0), candidate("c", "c 5", -8.0))
    metrics = measure(HeldOut.of([example(query="5", candidates=row)], 0.05))
    assert (metrics["P@1"], metrics["MRR@10"]) == (0.0, pytest.approx(1 / 3))


def test_only_what_was_judged_is_ranked() -> None:
    """Another query's memory, nearer than all of its own, is neither right nor wrong."""
    mine = example("mine", query="at 0",
                   candidates=(candidate("a", "40", -1.0), candidate("c", "60", -9.0)))  # fmt: skip
    other = example("other", query="at 90",
                    candidates=(candidate("b", "1", -1.0), candidate("d", "0", -9.0)))  # fmt: skip
    assert measure(HeldOut.of([mine, other], 0.05))["P@1"] == 1.0


def test_its_own_memory_and_copies_are_not_ranked() -> None:
    own = memory_text("question q", "answer q")
    row = (candidate("q", own, -0.1), candidate("copy", own.upper(), -0.1),
           candidate("other", "other", -1.0), candidate("last", "last", -9.0))  # fmt: skip
    graded = HeldOut.of([example("q", candidates=row)], 0.05).grades
    assert graded == {"q": {"other": 3, "last": 0}}


def test_a_query_to_which_all_candidates_are_alike_tells_nothing() -> None:
    both = (candidate("a", "40", -1.0), candidate("b", "60", -1.0))
    held_out = HeldOut.of([example("mine", candidates=both), *examples(1)], 0.05)
    assert list(held_out.queries) == ["main-0"] and held_out.indifferent == 1


def imported(folder: Path, *rows: dict[str, object], pool: str = "imported") -> Path:
    file = folder.with_suffix(".jsonl")
    file.write_text("\n".join(map(json.dumps, rows)))
    import_examples(file, folder, pool)
    return folder


def test_a_data_sets_queries_rank_all_of_its_texts(tmp_path: Path) -> None:
    """Pairs alone: what answers another query is not relevant, unless it is named for this one."""
    pairs = imported(
        tmp_path / "pairs",
        {"query": "at 0", "pos": ["a 30"]},
        {"query": "at 90", "pos": ["a 85"]},
        {"query": "at 20", "pos": ["a 85"], "neg": ["no 21"]},
        {"query": "AT 0", "pos": ["A  10"]},  # the first one asked again
        {"query": "at 45", "pos": ["at 0"]},  # a text that is a query does not answer itself
    )
    other = imported(tmp_path / "other", {"query": "at 1", "pos": ["o 1"]}, pool="other")
    held_out = HeldOut.of([*read_examples(pairs), *read_examples(other)], 0.05)
    assert (len(held_out.queries), len(held_out.texts)) == (4, 5)
    assert held_out.indifferent == 1  # the other data set has no text but the answer
    # at 0: a 10, no 21, a 30, a 85; at 90: a 85, ...; at 20: no 21, a 30 and a 10, at 0, a 85
    # at 45: a 30, no 21, a 10, a 85, at 0
    assert measure(held_out) == pytest.approx(
        {
            "P@1": 2 / 4,
            "MRR@10": (1 + 1 + 1 / 5 + 1 / 5) / 4,
            "nDCG@10": ((1 + 1 / 2) / (1 + 1 / math.log2(3)) + 1 + 2 / math.log2(6)) / 4,
            "recall@10": 1.0,
            "recall@1": (1 / 2 + 1) / 4,
            "recall@3": (1 + 1) / 4,
        }
    )


def test_a_pair_that_is_trained_on_the_other_way_round_is_left_out(tmp_path: Path) -> None:
    """Paraphrases come in both orders: either text may be on the side that evaluates."""
    asked = {"query": "how old is it?", "pos": ["its age?", "what is its age?"]}
    other = {"query": "where is it?", "pos": ["in which place is it?"]}
    turned = {"query": "What is  its age?", "pos": ["how old is it?"], "neg": ["where is it?"]}
    kept = imported(tmp_path / "kept", asked, other, {"query": "who?", "pos": ["by whom?"]})
    train = select(read_examples(imported(tmp_path / "train", turned)), TrainingConfig())
    config = load_config(None, ["training.eval_every=1"])
    held_out = read_held_out(config, [kept], [], train.items)
    assert list(held_out.queries.values()) == ["where is it?", "who?"]
    assert held_out.trained == 1
    assert read_held_out(config, [kept], [], []).trained == 0


def test_a_data_set_is_evaluated_as_sentence_transformers_does(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path / "tiny")
    rng = random.Random(0)
    topics = [" ".join(rng.choices(TOPICS, k=4)) for _ in range(60)]
    rows = [
        {"query": f"{topic} {i}", "pos": [f"{topic[:9]} {i + 1}"]} for i, topic in enumerate(topics)
    ]
    held_out = HeldOut.of(read_examples(imported(tmp_path / "pairs", *rows)), 0.05)
    theirs = InformationRetrievalEvaluator(
        dict(held_out.queries), dict(held_out.texts),
        {id: {doc for doc in graded if graded[doc]} for id, graded in held_out.grades.items()},
    )(SentenceTransformer(str(folder), device="cpu"))  # fmt: skip
    ours = evaluate(held_out, Encoder.from_folder(folder, "cpu"), ONE)
    names = {"P@1": "accuracy@1", "MRR@10": "mrr@10", "nDCG@10": "ndcg@10",
             "recall@1": "recall@1", "recall@3": "recall@3", "recall@10": "recall@10"}  # fmt: skip
    assert ours == pytest.approx({name: theirs[f"cosine_{other}"] for name, other in names.items()})
    assert 0.05 < ours["MRR@10"] < 0.95


def test_bm25_beside_encoders(tmp_path: Path) -> None:
    """Words alone: the second query finds another one's answer, the third one's text is itself."""
    rows = [
        {"query": "red iron gate", "pos": ["a gate of iron"], "neg": ["a wooden door"]},
        {"query": "wooden", "pos": ["made of timber"]},
        {"query": "a wooden door", "pos": ["a door of wood"]},
    ]
    held_out = HeldOut.of(read_examples(imported(tmp_path / "made", *rows)), 0.05)
    found = evaluate_bm25(held_out, BM25Config())
    assert found["recall@10"] == 1.0 and found["P@1"] == pytest.approx(2 / 3)


def test_encoders_are_compared_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = imported(tmp_path / "made", *({"query": f"q {i}", "pos": [f"a {i}"]} for i in range(9)))
    encoders = [str(tiny_encoder(tmp_path / name, dim=dim)) for name, dim in (("x", 32), ("y", 64))]
    file = tmp_path / "figures.json"
    ways = [f"--encoder={name}" for name in encoders]
    assert main(["examples", "evaluate", str(made), *ways, "--json", str(file)]) == 0
    told = json.loads(file.read_text())
    held_out = HeldOut.of(read_examples(made), 0.05)
    assert (told["queries"], told["texts"]) == (9, 9)
    for name in encoders:
        assert told[name] == evaluate(held_out, Encoder.from_folder(name, "cpu"), ONE)
    one = imported(tmp_path / "one", {"query": "q", "pos": ["a"]})
    assert main(["examples", "evaluate", str(one)]) == 2
    assert main(["examples", "evaluate", str(made), "--encoder", str(tmp_path / "no")]) == 2
    assert main(["examples", "evaluate", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    for reason in ("no query there for which", "no finished round of examples"):
        assert reason in said


def test_many_texts_beside_a_sort_of_all(tmp_path: Path) -> None:
    places = list(range(180))
    random.Random(0).shuffle(places)
    rows = [{"query": f"q {i}", "pos": [f"a {place}.3"]} for i, place in enumerate(places)]
    rows += [{"query": f"q {i}", "pos": [f"a {i}.3"]} for i in range(0, 180, 3)]  # another answer
    held_out = HeldOut.of(read_examples(imported(tmp_path / "many", *rows)), 0.05)
    assert len(held_out.queries) == len(held_out.texts) == 180
    angle = {id: float(text.split()[1]) for id, text in held_out.texts.items()}
    runs: dict[str, list[str]] = {}
    for id, text in held_out.queries.items():
        distance = {doc: abs(at - float(text.split()[1])) for doc, at in angle.items()}
        runs[id] = sorted(distance, key=distance.__getitem__)
    want = mean_metrics(ir_metrics(runs, held_out.grades, EVALUATED), EVALUATED)
    assert measure(held_out) == pytest.approx(want) and 0.3 < want["MRR@10"] < 0.5


@pytest.mark.parametrize(
    ("labels", "baseline", "logliks", "want"),
    [
        ("likelihood", -2.0, (-1.0, -1.6, -2.0), [3, 2, 0]),
        ("likelihood", None, (-1.0, -1.6, -2.0), None),  # nothing was measured to compare with
        # what is not finite says nothing, as in training
        ("likelihood", -2.0, (-1.0, math.nan, -math.inf), [3, 0, 0]),
        ("likelihood", math.nan, (-1.0, -1.6, -2.0), None),
        ("likelihood", -math.inf, (-1.0, -1.6, -math.inf), None),
        ("reward", 0.5, (0.8, 0.6, None), [3, 1, 0]),
        ("given", None, (0.0, -1.0, -1.0), [3, 0, 0]),
        ("prompted", None, (math.log(0.9), math.log(0.25), math.log(0.04)), [3, 1, 0]),
        ("none", None, (1.0, 0.5, 0.0), [3, 2, 0]),
    ],
)
def test_relevance_by_labels(
    labels: str, baseline: float | None, logliks: tuple[float | None, ...], want: list[int] | None
) -> None:
    row = tuple(candidate(f"c{i}", f"text {i}", value) for i, value in enumerate(logliks))
    item = example(labels=labels, baseline_loglik=baseline, candidates=row)
    held_out = HeldOut.of([item], 0.05)
    ids = [item.id for item in row]
    assert held_out.grades == ({} if want is None else {"q": dict(zip(ids, want, strict=True))})
    assert held_out.indifferent == (want is None) and bool(held_out) == (want is not None)


def test_the_encoder_and_the_random_state_are_as_before(tmp_path: Path) -> None:
    encoder = Encoder.from_folder(tiny_encoder(tmp_path / "tiny"), "cpu")
    held_out = HeldOut.of(examples(12), 0.05)
    encoder.model.train()
    before = torch.get_rng_state()
    once = evaluate(held_out, encoder, ONE)
    assert evaluate(held_out, encoder, ONE) == once  # no dropout
    assert encoder.model.training and torch.get_rng_state().equal(before)


def selected(name: str, query: str = "another") -> Selected:
    return Selected(name, query, "main", None, 1, "", (), (), frozenset())


def test_where_held_out_examples_are_found(tmp_path: Path) -> None:
    rounds = [tmp_path / "1", tmp_path / "2", tmp_path / "3"]
    for number, folder in enumerate(rounds[:2]):
        write_round(held_out_dir(folder), examples(4, seed=number, start=2 * number))
    config = load_config(None, ["training.eval_every=1"])
    held_out = read_held_out(config, None, rounds, [selected("main-5")])
    assert list(held_out.queries) == [f"main-{i}" for i in range(5)] and held_out.trained == 1
    asked = selected("of another id", f" {examples(4)[3].query.upper()}")
    asked_for = read_held_out(config, None, rounds[:1], [asked])
    assert list(asked_for.queries) == [f"main-{i}" for i in range(3)]
    assert asked_for.trained == 1
    again = HeldOut.of([*examples(2), *examples(3, seed=1, start=2)], 0.05)
    assert held_out.digest == again.digest
    other = read_held_out(config, [held_out_dir(rounds[0])], rounds, [])
    assert len(other.queries) == 4 and other.digest != again.digest
    with pytest.raises(ExamplesError, match="no finished round"):
        read_held_out(config, [rounds[2]], rounds, [])
    off = load_config()
    assert (
        not read_held_out(off, None, rounds, []) and read_held_out(off, None, [], []).digest is None
    )
    with pytest.raises(ExamplesError, match=r"training\.eval_every"):
        read_held_out(off, rounds, rounds, [])
