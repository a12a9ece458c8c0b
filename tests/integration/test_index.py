"""train/index.py where the round was indexed before, whole or killed, or is indexed poorly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from memshare.config import Config
from memshare.retrieval.gate import GateResult
from memshare.retrieval.generation import current, generations, verify_generation
from memshare.retrieval.manifest import folder_name
from memshare.retrieval.publish import activate
from memshare.retrieval.shelf import numbers
from tests.retrieving import fill, make_config, open_store
from tests.tiny import tiny_encoder
from tests.training_runs import ROOT, load_program

Index = Callable[..., dict[str, Any]]


class Killed(BaseException):
    """In place of a SIGKILL: nobody handles it, and what is on disk is what a kill would leave."""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    made = make_config(tmp_path / "run", tiny_encoder(tmp_path / "encoder"))
    with open_store(made) as store:
        fill(store, "p", 5)
    return made


@pytest.fixture
def program(tmp_path: Path, config: Config) -> Callable[..., int]:
    """Runs the program with some more words; returns its exit code."""
    module = load_program(ROOT / "train" / "index.py")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return lambda *words: int(module.main(["--config", str(file), *words]))


@pytest.fixture
def index(program: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Index:
    """Runs the program for a round and returns what it printed, with what it logged as `log`."""

    def run(number: int, *words: str, encoder: object = "frozen") -> dict[str, Any]:
        assert program("--encoder", str(encoder), "--round", str(number), *words) == 0
        told = capsys.readouterr()
        outcome: dict[str, Any] = json.loads(told.out)
        assert outcome["round"] == number
        return {**outcome, "log": told.err}

    return run


def published(outcome: dict[str, Any]) -> int:
    """The generation's number; fails for any other outcome."""
    assert outcome["outcome"] == "published"
    return int(outcome["generation"])


def test_a_round_is_published_once_and_a_damaged_generation_is_passed_over(
    config: Config, index: Index
) -> None:
    def metrics(generation: int) -> Path:
        return config.retriever_dir / folder_name(generation) / "metrics.json"

    assert [published(index(number, "--no-gate")) for number in (1, 2, 1)] == [1, 2, 1]
    metrics(2).write_text(metrics(2).read_text()[:8])
    assert [published(index(number, "--no-gate")) for number in (1, 2)] == [1, 3]
    verify_generation(config.retriever_dir, 3)
    metrics(3).unlink()
    assert published(index(1, "--no-gate")) == 1
    assert current(config.retriever_dir) == 3  # nothing more was published


@pytest.fixture
def kill(index: Index, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Runs the program for a round and kills it when its generation is there, and CURRENT due."""

    def killed(home: Path, staged: Path) -> None:
        raise Killed

    def run(number: int) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("memshare.retrieval.publish.write_current", killed)
            with pytest.raises(Killed):
                index(number, "--no-gate")

    return run


def test_a_publish_that_was_killed_before_current_moved_is_completed(
    config: Config, index: Index, kill: Callable[[int], None]
) -> None:
    home = config.retriever_dir
    kill(1)
    assert numbers(home) == [1] and current(home) is None
    assert published(index(1, "--no-gate")) == 1 == current(home)
    for number in range(2, config.retriever.keep + 2):
        kill(number)
        assert current(home) == number - 1
        assert published(index(number, "--no-gate")) == number == current(home)
    assert len(numbers(home)) == config.retriever.keep  # the oldest is pruned, too

    kill(9)
    latest = numbers(home)[-1]
    weights = home / folder_name(latest) / "encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert published(index(9, "--no-gate")) == latest + 1 == current(home)
    verify_generation(home, latest + 1)


def test_a_publish_that_was_killed_is_completed_by_nobody_where_a_pin_holds(
    config: Config, index: Index, kill: Callable[[int], None]
) -> None:
    home = config.retriever_dir
    index(1, "--no-gate")
    kill(2)
    activate(home, 1)
    outcome = index(2, "--no-gate")
    assert published(outcome) == 2 and "1 is pinned and stays CURRENT" in outcome["log"]
    assert current(home) == 1 and numbers(home) == [1, 2]


def test_a_folder_that_was_trained_into_again_is_published_again(
    tmp_path: Path, config: Config, index: Index
) -> None:
    folder = tiny_encoder(tmp_path / "trained" / "encoder", seed=1)
    assert [published(index(1, "--no-gate", encoder=folder)) for _ in range(2)] == [1, 1]
    tiny_encoder(folder, seed=2)
    assert [published(index(1, "--no-gate", encoder=folder)) for _ in range(2)] == [2, 2]
    assert current(config.retriever_dir) == 2
    first, second = generations(config.retriever_dir)
    assert first.query_fingerprint != second.query_fingerprint
    assert first.memory_fingerprint != second.memory_fingerprint


def test_a_rejected_rounds_memories_are_published_under_the_encoder_that_serves(
    tmp_path: Path,
    config: Config,
    index: Index,
    program: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told: list[int | None] = []
    home, report = config.retriever_dir, tmp_path / "index.json"
    index(1, "--no-gate")
    (served,) = generations(home)
    with open_store(config) as store:
        fill(store, "p", 6, seed=1)
    monkeypatch.setattr("memshare.retrieval.gate_run.run_gate", lambda *_: GateResult(False, "", 3))
    monkeypatch.setattr("memshare.retrieval.refresh.MAX_DELTA", 5)
    folder = tiny_encoder(tmp_path / "trained" / "encoder", seed=1)
    outcome = index(2, "--result", str(report), encoder=folder)
    assert (outcome["outcome"], outcome["generation"]) == ("rejected", 1)
    assert json.loads(report.read_text())["outcome"] == "rejected"
    _, fresh = generations(home)
    assert fresh.number == 2 == current(home) and fresh.rows == served.rows + 6
    assert fresh.query_fingerprint == served.query_fingerprint
    assert published(index(1, "--no-gate")) == 1  # which brought the encoder that serves
    assert numbers(home) == [1, 2]
    assert len((home / "rejected.jsonl").read_text().splitlines()) == 1

    with open_store(config) as store:
        fill(store, "p", 6, seed=2)
    weights = home / folder_name(2) / "encoder" / "model.safetensors"
    weights.rename(home / "kept")
    assert "the current generation stays as it is" in index(3, encoder=folder)["log"]
    assert program("--refresh") == 1 and current(home) == 2
    (home / "kept").rename(weights)
    for _ in range(2):  # the second time nothing is new
        capsys.readouterr()
        assert program("--refresh") == 0 and current(home) == 3
        told.append(json.loads(capsys.readouterr().out)["generation"])
    assert told == [3, None] and generations(home)[-1].rows == fresh.rows + 6


def test_a_generation_whose_index_finds_too_little_is_rejected(
    config: Config, index: Index
) -> None:
    with open_store(config) as store:
        fill(store, "p", 195)
    home = config.retriever_dir
    index(1, "--no-gate")
    poor = {"kind": "ivf", "approximate_from": 100, "nlist": 5, "nprobe": 1, "recall_floor": 1.0}
    words = [f"--set=retriever.index.{key}={value}" for key, value in poor.items()]
    outcome = index(2, "--no-gate", *words)
    assert (outcome["outcome"], outcome["generation"]) == ("rejected", 1)
    (line,) = (home / "rejected.jsonl").read_text().splitlines()
    rejection = json.loads(line)
    assert rejection["round"] == 2 and rejection["gate"]["passed"] is False
    for told in (outcome["gate"]["reason"], rejection["gate"]["reason"], outcome["log"]):
        assert "below retriever.index.recall_floor 1: p 0." in told
        assert "Raise retriever.index.nprobe" in told
    assert current(home) == 1 and numbers(home) == [1]
    assert published(index(2, "--no-gate", *words, "--set=retriever.index.nprobe=5")) == 2
