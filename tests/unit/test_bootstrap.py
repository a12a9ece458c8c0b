"""Interactive learning: which written questions are let through, and what comes of them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch

from memshare.bootstrap import BootstrapError, QuestionFilter, bootstrap, tidy, write_question
from memshare.cli import main
from memshare.config import BootstrapConfig
from memshare.llm.base import Chat, Completion
from memshare.pool.store import PoolStore
from memshare.records import NewMemory
from memshare.sharing import SharedMemory, open_shared
from tests.loop import loop_config, loop_config_file
from tests.tiny_lm import tiny_lm

SEEDS = [f"Write a limerick about the {thing} of a cat by the sea." for thing in "abcdefgh"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def questions() -> QuestionFilter:
    config = BootstrapConfig(min_chars=12, near_duplicate=0.5)
    return QuestionFilter(config, ["Which tree grows fastest in the rain forest?"], 200)


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        ("   Why?   ", "question too short"),
        ("which tree  grows fastest in the RAIN forest?", "copy of a seed question"),
        ("Which tree grows fastest in the rain forest today?", "near-duplicate question"),
        ("x" * 201, "unusable question"),
        ("a NUL \x00 in the question", "unusable question"),
        ("Which tree grows in a desert without rain?", None),
        ("沙漠里没有雨水的时候哪一种树可以生长？", None),
    ],
)
def test_trivial_questions_are_rejected(
    questions: QuestionFilter, question: str, reason: str | None
) -> None:
    assert questions.reject(question) == reason


def test_what_was_written_before_is_remembered(questions: QuestionFilter) -> None:
    first = "Which plan is best for a weekend in Paris with two children?"
    assert questions.reject(first) is None
    assert questions.reject(first.upper()) == "repeated question"
    assert questions.reject(first + " And why?") == "near-duplicate question"
    assert questions.reject("Plan a rainy week in Lisbon for a chess club.") is None


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("1. What is up?\n\nAnswer: the sky", "What is up?"),
        ('  "What is up?"', "What is up?"),
        ("Question 3: What is up?", "What is up?"),
        ("- “What is up?”\n", "What is up?"),
        ("What is 2.5 times 4?", "What is 2.5 times 4?"),
        ("2024 was a leap year. Why?", "2024 was a leap year. Why?"),
        ("", ""),
    ],
)
def test_only_the_question_is_kept(text: str, question: str) -> None:
    assert tidy(text) == question


def seeded(shared: SharedMemory) -> None:
    shared.writer.append_visible(
        [NewMemory("keep", seed, "There once was a cat.") for seed in SEEDS]
    )


def test_same_seed_same_question(tmp_path: Path, models: Path) -> None:
    async def body() -> None:
        async with open_shared(loop_config(tmp_path, models)) as shared:
            seeded(shared)
            seeds = list(shared.store.iter("keep"))
            config = BootstrapConfig(temperature=1.0)
            llm = shared.agent.llm
            written = [await write_question(llm, seeds, config, seed) for seed in (1, 1, 2)]
            assert written[0] == written[1] != written[2]

    asyncio.run(body())


def test_every_question_ends_with_a_reason_on_record(tmp_path: Path, models: Path) -> None:
    async def body() -> None:
        section = {"questions": 12, "rounds": 2, "temperature": 1.0}
        config = loop_config(tmp_path, models, bootstrap=section)
        async with open_shared(config) as shared:
            seeded(shared)
            report = await bootstrap(shared, "keep")
            assert report.seeds == len(SEEDS)
            assert report.questions == sum(report.counts.values()) == 24
            stats = shared.store.stats("keep")
            assert stats.memories == len(SEEDS) + len(report.stored)
            assert report.counts.get("stored", 0) == len(report.stored)
            # What reached the scorer is on the pool's record; trivial questions never did.
            decided = {reason: report.counts[reason] for reason in stats.decisions}
            assert decided == stats.decisions

    asyncio.run(body())


@pytest.fixture(scope="module")
def brief(models: Path) -> Path:
    """The tiny model with a louder end-of-turn token: it comes to an end by itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_lm(models / "brief")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.eos_token_id] *= 2
    model.save_pretrained(folder)
    return folder


def test_answers_that_the_scorer_accepts_become_memories(
    tmp_path: Path, models: Path, brief: Path
) -> None:
    async def body() -> None:
        config = loop_config(
            tmp_path,
            models,
            agent_llm={"model": str(brief)},
            bootstrap={"questions": 16, "min_chars": 1, "temperature": 1.0},
            agent={"max_tokens": 200, "temperature": 1.0, "shots": 1},
        )
        async with open_shared(config) as shared:
            seeded(shared)
            report = await bootstrap(shared, "keep")
            assert len(report.stored) > 0, report.counts
            for memory in shared.store.get_many(report.stored).values():
                assert (memory.agent, memory.metadata) == ("bootstrap", {"source": "bootstrap"})
                assert memory.score is not None
                assert memory.prompt not in SEEDS

    asyncio.run(body())


@pytest.mark.parametrize(
    ("ended", "reason"),
    [("length", "question cut off by length"), ("content_filter", "question not finished")],
)
def test_a_question_that_did_not_end_by_itself_is_none(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch, ended: str, reason: str
) -> None:
    async def half(chat: Chat) -> Completion:
        return Completion("Write a story about a king who", ended, 1, 1)

    async def body() -> None:
        async with open_shared(loop_config(tmp_path, models, bootstrap={"questions": 2})) as shared:
            seeded(shared)
            monkeypatch.setattr(shared.agent.llm, "chat", half)
            assert (await bootstrap(shared, "keep")).counts == {reason: 2}

    asyncio.run(body())


def test_empty_pool_can_not_be_grown(tmp_path: Path, models: Path) -> None:
    async def body() -> None:
        async with open_shared(loop_config(tmp_path, models)) as shared:
            with pytest.raises(BootstrapError, match="add a few seed memories"):
                await bootstrap(shared, "keep")

    asyncio.run(body())


def test_command_line(tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = loop_config_file(tmp_path, models, bootstrap={"questions": 2})
    line = ["bootstrap", "--config", str(path), "--pool", "keep"]
    assert main(line) == 2
    assert "is empty" in capsys.readouterr().err
    assert main([*line[:-1], "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
    with PoolStore.open(f"sqlite:///{tmp_path / 'pool.db'}") as store:
        store.append([NewMemory("keep", seed, "There once was a cat.") for seed in SEEDS])
    assert main([*line, "--json", str(tmp_path / "report.json")]) == 0
    printed = json.loads(capsys.readouterr().out)
    written = json.loads((tmp_path / "report.json").read_text())
    assert printed["questions"] == written["questions"] == 2
    assert printed["counts"] == written["counts"]
