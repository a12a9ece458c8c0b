"""The gate: grades, pooling, and a verdict against the current and the best so far."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memshare.config import Config, GateConfig, WandbConfig
from memshare.pool.store import PoolStore
from memshare.records import Memory, NewMemory
from memshare.retrieval.build import build_generation
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.gate import choose_queries, decide, grades, judge
from memshare.retrieval.gate_run import gate_built, run_gate
from memshare.retrieval.generation import best
from memshare.retrieval.publish import publish
from memshare.retrieval.serving import Serving
from tests.retrieving import fill, make_config, open_store
from tests.tiny import tiny_encoder

Rows = dict[str, dict[str, float]]


def rows(values: Sequence[float], shift: float = 0.0) -> Rows:
    return {
        f"q{i}": {"nDCG@10": value + shift, "MRR@10": value + shift, "P@1": 0.0, "recall@10": 0.0}
        for i, value in enumerate(values)
    }


BASE = [0.1 * (i % 10) for i in range(100)]


def test_grades() -> None:
    assert grades([0.0, 0.05, 0.06, 0.2, 0.21, 0.4, 0.41, 0.6], 0.05) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert grades([1.0, 0.0, 1.0], 0.05) == [3, 0, 3]
    assert grades([], 0.05) == [] and grades([-1.0, -2.0], 0.0) == [0, 0]


@given(st.lists(st.floats(-5, 5), max_size=20), st.floats(0, 1))
def test_grades_follow_gains(gains: list[float], threshold: float) -> None:
    found = grades(gains, threshold)
    for a, b in zip(gains, found, strict=True):
        assert 0 <= b <= 3 and (b > 0) == (a > threshold)
    order = sorted(range(len(gains)), key=lambda i: gains[i])
    assert [found[i] for i in order] == sorted(found)


def test_better_and_equal_pass_and_worse_fails() -> None:
    config = GateConfig(margin=0.02)
    for shift, passed in ((0.1, True), (0.0, True), (-0.01, True), (-0.03, False), (-0.3, False)):
        result = decide(rows(BASE), rows(BASE, shift), None, config, 0)
        assert result.passed is passed and result.queries == 100
        interval = result.figures["differences"]["current"]["nDCG@10"]
        assert interval["low"] <= interval["mean"] == pytest.approx(shift, abs=1e-9)
    assert "nDCG@10 against current: -0.3000" in result.reason


def test_a_noisy_gain_on_few_queries_fails() -> None:
    """The mean is above -margin, but a loss can't be excluded."""
    noisy = {q: dict.fromkeys(row, 1.0 if i % 2 else 0.0) for i, (q, row) in enumerate(rows([0.5] * 8).items())}  # fmt: skip  # noqa: E501
    assert not decide(rows([0.5] * 8), noisy, None, GateConfig(margin=0.02), 0).passed


def test_a_more_confident_interval_is_wider() -> None:
    noisy = {
        q: {name: value + (0.3 if i % 2 else -0.3) for name, value in row.items()}
        for i, (q, row) in enumerate(rows(BASE[:30]).items())
    }
    for confidence, passed in ((0.5, True), (0.99, False)):
        config = GateConfig(margin=0.07, confidence=confidence)
        assert decide(rows(BASE[:30]), noisy, None, config, 0).passed is passed


def test_small_losses_do_not_add_up() -> None:
    """Each step loses less than the margin against the one before; the best so far stops them."""
    config, shift, steps = GateConfig(margin=0.02), 0.0, 0
    while decide(rows(BASE, shift), rows(BASE, shift - 0.015), rows(BASE), config, 0).passed:
        shift, steps = shift - 0.015, steps + 1
        assert steps < 5
    assert steps == 1
    result = decide(rows(BASE, shift), rows(BASE, shift - 0.015), rows(BASE), config, 0)
    assert "against best" in result.reason and "against current" not in result.reason


def test_different_queries_are_an_error() -> None:
    with pytest.raises(ValueError, match="same queries"):
        decide(rows(BASE), rows(BASE[:-1]), None, GateConfig(), 0)


def test_no_queries() -> None:
    result = decide({}, {}, None, GateConfig(), 0)
    assert result.passed and result.record()["reason"] == "no held-out queries"


def test_judging_is_over_the_union() -> None:
    runs = {"current": {"q": ["a", "b"], "r": ["a"]}, "next": {"q": ["c"], "r": ["b"]}}
    gains = {"q": {"a": 0.0, "b": 0.3, "c": 0.9}, "r": {"a": 0.0, "b": -1.0}}
    found = judge(runs, gains, 0.05)
    assert set(found["next"]) == {"q"}  # nothing relevant for r by anyone
    assert found["next"]["q"]["MRR@10"] == 1.0 and found["current"]["q"]["MRR@10"] == 0.5
    assert 0 < found["current"]["q"]["recall@10"] < 1


def test_the_choice_of_queries_is_stable_as_the_pool_grows() -> None:
    def item(i: int) -> Memory:
        return Memory(f"m{i}", "p", "q", "a", None, None, None, "2026-01-01", {}, i, False)

    small, large = ([item(i) for i in range(n)] for n in (100, 110))
    a, b = ({m.id for m in choose_queries(group, 40, 0)} for group in (small, large))
    assert len(a) == len(b) == 40 and len(a & b) >= 30


# With real encoders: one knows the words, the other is the same with scrambled weights.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("gate") / "encoder")


@pytest.fixture
def config(tmp_path: Path, folder: Path) -> Config:
    return make_config(tmp_path / "run", folder)


def scrambled(folder: Path) -> Encoder:
    import torch

    encoder = Encoder.from_folder(folder, device="cpu")
    table = encoder.model.embeddings.word_embeddings.weight
    with torch.no_grad():
        # Constant word vectors: only the length of a text is left of it.
        table.copy_(table.mean(dim=0, keepdim=True).expand_as(table))
    return encoder


def topical(store: PoolStore, topics: int = 12, each: int = 6) -> list[Memory]:
    """Memories by topic; the words of a topic are its own. Returns one of each as a query."""
    words = [f"{chr(97 + i % 26)}{chr(97 + i * 7 % 26)}{chr(97 + i * 3 % 26)}" for i in range(60)]
    for t in range(topics):
        mine = words[5 * t : 5 * t + 5]
        store.append(
            [
                NewMemory("p", " ".join(mine[j % 5 :] + mine[: j % 5]) + f" {j}", f"topic {t}")
                for j in range(each)
            ]
        )
    seen: dict[str, Memory] = {}
    for memory in store.iter("p"):
        seen.setdefault(memory.answer, memory)
    return list(seen.values())


def gains(query: Memory, candidates: Sequence[Memory]) -> list[float]:
    assert query.id not in [memory.id for memory in candidates], "a question answers itself"
    return [1.0 if memory.answer == query.answer else 0.0 for memory in candidates]


async def same_topic(query: Memory, candidates: Sequence[Memory]) -> list[float]:
    return gains(query, candidates)


def test_a_ruined_encoder_does_not_pass(config: Config, folder: Path) -> None:
    with open_store(config) as store:
        queries = topical(store)
        good = Encoder.from_folder(folder, device="cpu")
        bad = scrambled(folder)
        passes = gate_built(
            store, config, good, build_generation(store, config, good), queries, same_topic
        )
        fails = gate_built(
            store, config, bad, build_generation(store, config, bad), queries, same_topic
        )
    assert passes.passed and passes.best is None and passes.queries == 12
    assert passes.figures["bm25"]["MRR@10"] > 0.5 and passes.figures["next"]["MRR@10"] > 0.5
    assert passes.record()["generations"] == {"current": 0}
    assert not fails.passed and fails.best == 0 and "against current" in fails.reason
    assert passes.samples == ()  # texts leave the pool for nobody who did not ask for them
    asked = config.model_copy(update={"wandb": WandbConfig(samples=2)})
    with open_store(config) as store:
        built = build_generation(store, config, bad)
        shown = gate_built(store, asked, bad, built, queries, same_topic).samples
        texts = {memory.prompt: memory for memory in store.iter("p")}
    assert len(shown) == 2 * 2 * 3  # questions, retrievers, memories
    assert {row.retriever for row in shown} == {"current", "next"}
    assert [row.rank for row in shown[:3]] == [1, 2, 3]
    for row in shown:
        query, found = texts[row.question], texts[row.memory.split("\n")[0]]
        assert row.gain == gains(query, [found])[0]
    assert "samples" not in passes.record()


def test_the_best_so_far_stays_the_measure(config: Config, folder: Path) -> None:
    """A bad generation was let in by a wide margin; the next is measured by the one before it."""
    loose = config.model_copy(update={"gate": GateConfig(margin=2.0)})
    good, bad = Encoder.from_folder(folder, device="cpu"), scrambled(folder)
    home = config.retriever_dir
    with open_store(config) as store:
        queries = topical(store)
        for encoder, settings in ((good, config), (bad, loose)):
            built = build_generation(store, config, encoder)
            verdict = gate_built(store, settings, encoder, built, queries, same_topic)
            assert verdict.passed
            publish(
                home, encoder=encoder, parent=None, keep=1, best=verdict.best,
                metrics={"gate": verdict.record()}, **built.parts(),
            )  # fmt: skip
        assert best(home) == 1  # and kept, though keep is 1
        built = build_generation(store, config, bad)
        verdict = gate_built(store, config, bad, built, queries, same_topic)
        assert not verdict.passed and verdict.best == 1
        assert "against best" in verdict.reason and "against current" not in verdict.reason
        assert verdict.record()["generations"] == {"current": 2, "best": 1}
        none = gate_built(store, config, bad, built, [], same_topic)
        assert none.passed and none.best == 1 and none.reason == "no held-out queries"


def test_copies_of_a_question_are_no_answers(config: Config, folder: Path) -> None:
    encoder = Encoder.from_folder(folder, device="cpu")
    with open_store(config) as store:
        fill(store, "p", 20)
        twins = store.append([NewMemory("p", "Same  question", f"answer {i}") for i in range(3)])
        query = store.get_many([twins[0].id])[twins[0].id]
        judged: list[str] = []

        async def nothing(asked: Memory, candidates: Sequence[Memory]) -> list[float]:
            judged.extend(memory.id for memory in candidates)
            return [0.0] * len(candidates)

        both = [Serving.frozen(encoder, ["p"]) for _ in range(2)]
        for serving in both:
            serving.catch_up(store)
        result = run_gate(store, config, *both, None, [query], nothing)
    assert len(judged) >= config.gate.depth and not {twin.id for twin in twins} & set(judged)
    assert result.passed and result.reason == "no held-out query has a relevant memory"
