"""One turn of the loop on real parts: what is retrieved, what is stored, what is on record."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from memshare.config import ConfigError
from memshare.llm.base import LLMError, LLMUnavailable
from memshare.llm.scorer import Scorer
from memshare.pool.errors import UnknownPool
from memshare.pool.store import PoolStore
from memshare.pool.uses import UseCounts
from memshare.records import Grade, NewMemory
from memshare.sharing import Decision, Pair, SharedMemory, assemble, open_shared
from tests.loop import loop_config

Run = Callable[[Callable[[SharedMemory], Coroutine[Any, Any, Any]]], Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def run(tmp_path: Path, models: Path) -> Run:
    """Run a coroutine with the loop's parts around it."""

    def runner(body: Callable[[SharedMemory], Coroutine[Any, Any, Any]], **sections: Any) -> Any:
        async def inside() -> Any:
            async with open_shared(loop_config(tmp_path / "run", models, **sections)) as shared:
                return await body(shared)

        return asyncio.run(inside())

    return runner


def memories(pool: str, *prompts: str) -> list[NewMemory]:
    return [NewMemory(pool, prompt, f"answer to {prompt}") for prompt in prompts]


def test_retrieve_best_first_and_no_more_than_there_are(run: Run) -> None:
    async def body(shared: SharedMemory) -> None:
        empty = await shared.retrieve("keep", "anything", 3)
        assert (empty.memories, empty.generation) == ((), 0)
        shared.writer.append_visible(memories("keep", "red apples", "green pears", "blue plums"))
        found = await shared.retrieve("keep", "red apples", 10)
        assert len(found.memories) == 3
        assert found.memories[0].prompt == "red apples"
        assert list(found.similarities) == sorted(found.similarities, reverse=True)
        assert len((await shared.retrieve("keep", "red apples", 2)).memories) == 2

    run(body)


def test_an_evaluation_is_not_shown_the_question_itself(run: Run) -> None:
    async def body(shared: SharedMemory) -> None:
        copies = [NewMemory("keep", "Red  APPLES", f"answer {i}") for i in range(9)]
        shared.writer.append_visible([*copies, *memories("keep", "red pears", "green plums")])
        shown = await shared.retrieve("keep", "red apples", 2)
        assert {memory.prompt for memory in shown.memories} == {"Red  APPLES"}
        fair = await shared.retrieve("keep", "red apples", 2, exclude_copies=True)
        assert [memory.prompt for memory in fair.memories] == ["red pears", "green plums"]

    run(body)


def test_deleted_memory_is_not_shown_even_before_the_index_knows(run: Run) -> None:
    async def body(shared: SharedMemory) -> None:
        first, _ = shared.writer.append_visible(memories("keep", "red apples", "green pears"))
        shared.store.delete(first.id)
        found = await shared.retrieve("keep", "red apples", 2)
        assert [memory.prompt for memory in found.memories] == ["green pears"]

    run(body)


def test_stored_pair_has_provenance_and_is_searchable_at_once(run: Run) -> None:
    async def body(shared: SharedMemory) -> Decision:
        pair = Pair("keep", "Why?", "Because.", agent="ann", model="m1", metadata={"a": [1]})
        decision = await shared.grade_and_store(pair)
        assert (decision.status, decision.reason) == ("stored", "stored")
        assert decision.score is not None and 0 < decision.score < 100
        found = await shared.retrieve("keep", "Why?", 1)
        (memory,) = found.memories
        assert memory.id == decision.memory_id
        assert (memory.prompt, memory.answer) == ("Why?", "Because.")
        assert (memory.agent, memory.model, memory.metadata) == ("ann", "m1", {"a": [1]})
        assert memory.score == pytest.approx(decision.score)
        again = await shared.grade_and_store(replace(pair, answer="BECAUSE."))
        assert (again.status, again.memory_id) == ("duplicate", decision.memory_id)
        assert shared.store.decisions("keep") == {"duplicate": 1, "stored": 1}
        return decision

    run(body)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pool": "strict"}, "below threshold"),
        ({"finish_reason": "length"}, "cut off by length"),
        ({"finish_reason": "content_filter"}, "not finished"),
        ({"finish_reason": "abort"}, "not finished"),  # vLLM's own, of a server that is stopped
        ({"answer": " \n"}, "empty"),
        ({"prompt": ""}, "empty"),
        ({"answer": "a\x00b"}, "invalid"),
        ({"answer": "x" * 40_000}, "invalid"),
        ({"answer": "why?"}, "unreadable grade"),  # repeats the question: no verdict
    ],
)
def test_dropped_pair_leaves_its_reason_on_record(
    run: Run, change: dict[str, str], reason: str
) -> None:
    pair = replace(Pair("keep", "Why?", "Because."), **change)

    async def body(shared: SharedMemory) -> None:
        decision = await shared.grade_and_store(pair)
        assert (decision.status, decision.reason) == ("rejected", reason)
        assert shared.store.decisions(pair.pool) == {reason: 1}
        assert shared.store.stats(pair.pool).memories == 0

    run(body)


def test_garbled_structured_grade_rejects(run: Run) -> None:
    async def body(shared: SharedMemory) -> None:
        decision = await shared.grade_and_store(Pair("keep", "Why?", "Because."))
        assert (decision.status, decision.reason) == ("rejected", "unreadable grade")

    scorer = {"kind": "rubric", "grading": "structured", "max_tokens": 4}
    run(body, scorer=scorer, pools={"keep": {"threshold": 0, "rubric": "logic"}})


class Gives(Scorer):
    """The same grade to every pair."""

    def __init__(self, value: float) -> None:
        self.value = value

    async def _grade(self, prompt: str, answer: str, rubric_text: str) -> Grade:
        return Grade(self.value)


def test_a_grade_at_the_threshold_is_enough(run: Run) -> None:
    async def body(shared: SharedMemory) -> None:
        for value, reason in ((62.4, "below threshold"), (62.5, "stored")):
            shared.scorer = Gives(value)
            decision = await shared.grade_and_store(Pair("keep", "Why?", "Because."))
            assert (decision.reason, decision.score) == (reason, value)
        (memory,) = shared.store.iter("keep")
        assert memory.score == 62.5

    run(body, pools={"keep": {"threshold": 62.5}})


class Refuses(Scorer):
    """An LLM server's refusal or absence can't be had from an LLM in this process."""

    def __init__(self, error: LLMError) -> None:
        self.error = error

    async def _grade(self, prompt: str, answer: str, rubric_text: str) -> Grade:
        raise self.error


def test_scorer_that_refuses_rejects_and_one_that_is_away_decides_nothing(run: Run) -> None:
    async def body(shared: SharedMemory) -> None:
        pair = Pair("keep", "Why?", "Because.")
        shared.scorer = Refuses(LLMError("no such model"))
        decision = await shared.grade_and_store(pair)
        assert (decision.reason, decision.detail) == ("refused by the scorer", "no such model")
        shared.scorer = Refuses(LLMUnavailable("http://x: nobody there"))
        with pytest.raises(LLMUnavailable):
            await shared.grade_and_store(pair)
        assert shared.store.decisions("keep") == {"refused by the scorer": 1}

    run(body)


def test_whole_turn_shows_what_was_retrieved(run: Run) -> None:
    stages: list[str] = []

    async def body(shared: SharedMemory) -> None:
        shared.observe = lambda stage, seconds: stages.append(stage)
        shared.writer.append_visible(memories("keep", "red apples", "green pears", "blue plums"))
        turn = await shared.turn("keep", "red apples", agent="ann", seed=1)
        assert turn.answer.used == [memory.id for memory in turn.retrieved.memories]
        assert len(turn.answer.used) == 2
        # A random model talks until the limit; what is cut off is never stored.
        assert turn.answer.completion.finish_reason == "length"
        assert turn.decision.reason == "cut off by length"
        assert shared.store.stats("keep").memories == 3
        bare = await shared.turn("keep", "red apples", shots=0)
        assert (bare.retrieved.generation, bare.answer.used) == (None, [])

    run(body)
    assert {"retrieve", "llm", "store"} <= set(stages)


def test_unknown_pool(run: Run) -> None:
    async def body(shared: SharedMemory) -> None:
        with pytest.raises(UnknownPool, match="nowhere"):
            await shared.retrieve("nowhere", "q", 1)
        with pytest.raises(UnknownPool, match="nowhere"):
            await shared.grade_and_store(Pair("nowhere", "q", "a"))

    run(body)


def test_missing_rubric_is_found_before_anything_starts(tmp_path: Path, models: Path) -> None:
    pools = {"keep": {"rubric": "no-such-rubric"}}
    config = loop_config(tmp_path / "run", models, pools=pools)
    with pytest.raises(ConfigError, match=r"pools\.keep\.rubric.*no-such-rubric"):
        assemble(config)


def test_a_missing_rubric_that_a_pool_keeps_is_found_before_anything_starts(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pairs are graded by it, whatever the configuration says. Of another's pool it is told."""
    config = loop_config(tmp_path / "run", models)
    for name in ("keep", "older"):  # the second one is in the database alone
        with PoolStore.open(config.url) as store:
            store.create_pool(name)
            store.set_pool(name, rubric=str(tmp_path / "gone.md"))
        command = f"memshare pool create --pool {name} --rubric RUBRIC --config FILE"
        told = rf"pool {name}: .*gone\.md.*{command}"
        if name in config.pools:
            with pytest.raises(ConfigError, match=told):
                assemble(config)
        else:
            asyncio.run(assemble(config).aclose())
            assert re.search(f"warning: {told}", capsys.readouterr().err)
        with PoolStore.open(config.url) as store:
            store.set_pool(name, rubric="general")


def test_settings_that_a_pool_does_not_take_over_are_told(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It keeps those with which it was made: what was stored was graded by them."""
    for threshold, told in ((50, False), (20, True)):
        config = loop_config(tmp_path / "run", models, pools={"keep": {"threshold": threshold}})
        asyncio.run(assemble(config).aclose())
        said = "pools.keep: the pool keeps rubric general and threshold 50" in (
            capsys.readouterr().err
        )
        assert said is told


def test_stages_are_spans_of_the_request_without_any_text(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    monkeypatch.setattr("memshare.tracing._tracer", tracer)

    async def body(shared: SharedMemory) -> None:
        with tracer.start_as_current_span("request"):
            await shared.grade_and_store(Pair("keep", "PLANTED?", "PLANTED."))
            await shared.turn("keep", "PLANTED?")
        shared.scorer = Refuses(LLMUnavailable("PLANTED"))
        with pytest.raises(LLMUnavailable):
            await shared.grade_and_store(Pair("keep", "Why?", "Because."))

    run(body)
    spans = exporter.get_finished_spans()
    (request,) = [span for span in spans if span.name == "request"]
    below = [span.name for span in spans if span.parent and span.parent == request.context]
    assert below[:4] == ["score", "store", "retrieve", "llm"]  # the store's from its own thread
    assert spans[-1].name == "score" and spans[-1].status.description == "LLMUnavailable"
    assert "PLANTED" not in "".join(span.to_json() for span in spans)


def test_what_is_found_is_counted_and_an_evaluation_is_not(run: Run, tmp_path: Path) -> None:
    found: list[str] = []

    async def body(shared: SharedMemory) -> None:
        shared.writer.append_visible(memories("keep", "red apples", "green pears", "blue plums"))
        for question in ("red apples", "red apples", "green pears"):
            found.extend(m.id for m in (await shared.retrieve("keep", question, 1)).memories)
        await shared.retrieve("keep", "blue plums", 1, exclude_copies=True)

    run(body)
    with PoolStore.open(f"sqlite:///{tmp_path}/run/pool.db") as store:
        assert UseCounts(store.database).of_pool("keep") == {found[0]: 2, found[2]: 1}
