"""What the gate judges held-out questions by."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from memshare.config import load_config
from memshare.llm.factory import make_llm
from memshare.llm.likelihood import Likelihood
from memshare.pool.store import PoolStore
from memshare.records import Memory, NewMemory
from memshare.training.relevance import HeldOutRelevance, answer_overlap
from tests.tiny_lm import tiny_lm

ROWS = [
    NewMemory("main", "capital of France?", "Paris it is", metadata={"label": 1}),
    NewMemory("main", "capital of Italy?", "Rome it is", metadata={"label": 2}),
    NewMemory("main", "where is the tower?", "in Paris", metadata={"label": 1}),
    NewMemory("main", "seat of France?", "PARIS  it is"),
]


@pytest.fixture
def memories(tmp_path: Path):
    with PoolStore.open(f"sqlite:///{tmp_path / 'pool.db'}") as store:
        store.create_pool("main")
        store.append(ROWS)
        yield store, list(store.iter("main"))


def judge(store: PoolStore, rows: list[Memory], *sets: str, times: int = 1) -> list[list[float]]:
    relevance = HeldOutRelevance(load_config(None, sets), store)

    async def run() -> list[list[float]]:
        return list(await asyncio.gather(*(relevance(rows[0], rows[1:]) for _ in range(times))))

    return asyncio.run(run())


def test_answer_overlap() -> None:
    assert answer_overlap("Paris it is", "paris IT is") == 1.0
    assert answer_overlap("one two", "three") == answer_overlap("", "") == 0.0
    assert answer_overlap("a b", "a c") == 0.5


def test_without_an_llm(memories: tuple[PoolStore, list[Memory]]) -> None:
    assert judge(*memories, "mining.labels=given") == [[0.0, 1.0, 1.0]]
    assert judge(*memories, "mining.labels=none") == [[pytest.approx(2 / 3), 0.4, 1.0]]


def test_a_stated_probability_must_be_more_likely_than_not() -> None:
    above = {labels: load_config(None, [f"mining.labels={labels}"]).relevant_above
             for labels in ("prompted", "likelihood", "none")}  # fmt: skip
    assert above == {"prompted": 0.5, "likelihood": 0.05, "none": 0.05}
    assert load_config(None, ["mining.labels=prompted", "gate.gain=0.0"]).relevant_above == 0.0


def test_likelihood_gain_over_no_example(
    memories: tuple[PoolStore, list[Memory]], tmp_path: Path
) -> None:
    store, rows = memories
    lm = tiny_lm(tmp_path / "lm")
    sets = [f"run.dir={tmp_path}", f"scorer_llm.model={lm}", "mining.labels=likelihood"]
    found = judge(store, rows, *sets, times=3)
    assert judge(store, rows, *sets) == found[:1]  # a second loop works, from the cache

    async def direct() -> list[float]:
        llm = make_llm(load_config(None, sets).scorer_llm)
        likelihood = Likelihood(llm)
        base = await likelihood.baseline(rows[0].prompt, rows[0].answer)
        gains = [
            await likelihood.score(rows[0].prompt, rows[0].answer, [(row.prompt, row.answer)])
            - base
            for row in rows[1:]
        ]
        await llm.aclose()
        return gains

    expected = asyncio.run(direct())
    for row in found:
        assert row == pytest.approx(expected, abs=1e-4)
