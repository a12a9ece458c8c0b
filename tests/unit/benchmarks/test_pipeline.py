from __future__ import annotations

import sys
from pathlib import Path

import pipeline
import pytest

from memshare.evaluation.data import Pair
from tests.tiny import tiny_encoder


def test_a_failing_program_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "print('the reason'); raise SystemExit(3)"]
    with pytest.raises(pipeline.ProgramFailed, match=r"ended with 3.*\n(.*\n)*the reason"):
        pipeline.run_program(words, tmp_path / "logs" / "x.log")


def test_the_callers_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert pipeline.environment()["OMP_NUM_THREADS"] == "7"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert int(pipeline.environment()["OMP_NUM_THREADS"]) >= 1


def test_many_questions_through_the_searcher_never_find_their_own_copies(tmp_path: Path) -> None:
    settings = {
        "pools": {"main": {}},
        "encoder": {"model": str(tiny_encoder(tmp_path / "encoder")), "device": "cpu"},
    }
    work = pipeline.Work(tmp_path / "run", settings)
    pairs = [Pair(f"the {word} question", f"answer {word}") for word in ("red", "blue", "green")]
    memories = work.fill({"main": [*pairs, pairs[0]]})["main"]
    assert [memory.prompt for memory in memories] == [pair.prompt for pair in pairs]
    questions = ["The RED  question", "an apple"]
    with work.searcher() as search:
        assert search.generation == 0
        found = search("main", questions, 2)
        with_copies = search("main", questions, 3, copies=True)
    red = memories[0].id
    assert red not in found[0] and len(found[0]) == 2 and len(found[1]) == 2
    assert red in with_copies[0] and len(with_copies[0]) == 3


def test_a_work_folder_is_never_used_twice(tmp_path: Path) -> None:
    pipeline.Work(tmp_path / "run", {})
    with pytest.raises(FileExistsError):
        pipeline.Work(tmp_path / "run", {})
