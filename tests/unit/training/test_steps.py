"""The steps of a round as programs: their arguments, and what an exit code means."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from memshare.config import Config, load_config
from memshare.files import run_lock
from memshare.pool.errors import EXIT_DATABASE_AWAY, PoolUnavailable
from memshare.pool.store import PoolStore
from memshare.training.child import ChildFailed, Stopped
from memshare.training.journal import Round, Span
from memshare.training.outcome import DATABASE_AWAY, write_result
from memshare.training.steps import Steps

# Plays each program: notes its arguments and leaves what the real one would.
PROGRAM = """
import json, os, pathlib, sys
home = pathlib.Path(__file__).parent
with open(home / "calls.jsonl", "a") as calls:
    print(json.dumps([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]), file=calls)
words = dict(zip(sys.argv[1:], sys.argv[2:]))
code, report = home / "code", home / "report"
if report.exists():
    pathlib.Path(words["--result"]).write_text(report.read_text())
if code.exists():
    sys.exit(int(code.read_text()))
run = home / "run"
if "mine" in sys.argv[0]:
    folder = run / "examples" / f"{int(words['--round']):06d}"
    folder = folder if words["--iteration"] == "1" else folder / "iteration-2"
    folder.mkdir(parents=True)
    examples = home / "examples"
    found = int(examples.read_text()) if examples.exists() else 3
    (folder / "round.json").write_text(json.dumps({"shards": 0, "examples": found}))
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(None, [f"run.dir={tmp_path / 'run'}", "continual.poll_seconds=0.02"])


@pytest.fixture
def steps(config: Config, tmp_path: Path):
    for name in ("mine", "index"):
        (tmp_path / f"{name}.py").write_text(PROGRAM)
    config.run.dir.mkdir()
    with PoolStore.open(config.url) as store:
        yield Steps(config, store, tmp_path, ["--set", "a=b"], threading.Event())


def calls(tmp_path: Path) -> list[list[str]]:
    return [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]


def test_the_second_mining_is_proposed_by_what_the_first_has_taught(
    steps: Steps, tmp_path: Path
) -> None:
    now = Round(3, {"main": Span(4, 9)}, "start", iterations=2)
    assert steps.mine(now).outcome is None
    now = now.after({}, None).after({}, None)
    assert (now.step, now.iteration) == ("mine", 2)
    assert steps.mine(now).result["examples"] == 3
    first, second = calls(tmp_path)
    common = ["--round", "3", "--iteration", "1", "--since-seq", "main=4", "--until-seq", "main=9"]
    assert first == ["mine.py", "--set", "a=b", *common]
    encoder = str(tmp_path / "run/training/000003/encoder")
    assert second == ["mine.py", "--set", "a=b", *common[:3], "2", *common[4:],
                      "--proposer", encoder]  # fmt: skip
    logs = sorted(path.name for path in (tmp_path / "run/logs").iterdir())
    assert logs == ["round-000003-mine-1.log", "round-000003-mine.log"]


def test_what_the_last_iteration_taught_is_indexed(steps: Steps, tmp_path: Path) -> None:
    now = Round(3, {}, "start", step="index", iterations=2, iteration=2)
    output = tmp_path / "run/training/000003/iteration-2"
    output.mkdir(parents=True)
    with pytest.raises(FileNotFoundError):  # this program leaves no report
        steps.index(now)
    (call,) = calls(tmp_path)
    assert call[call.index("--encoder") + 1] == str(output / "encoder")
    (output / "index.json").write_text(json.dumps({"outcome": "rejected"}))
    assert steps.index(now).outcome == "rejected"
    assert len(calls(tmp_path)) == 1  # a report that stands is not made again


def test_a_second_iteration_without_examples_leaves_the_round_to_the_first(
    steps: Steps, tmp_path: Path
) -> None:
    now = Round(3, {}, "start", iterations=2)
    (tmp_path / "examples").write_text("0")
    assert steps.mine(now).outcome == "empty"  # the first one ends the round
    now = now.after({}, None).after({}, None)
    mined = steps.mine(now)
    assert (mined.result["examples"], mined.outcome) == (0, None)
    now = now.after(*mined)
    first, second = (tmp_path / "run/training/000003" / name for name in (".", "iteration-2"))
    second.mkdir(parents=True)
    write_result(second, "empty")
    trained = steps.train(now)  # which stands: nothing is launched
    assert (trained.result["status"], trained.outcome) == ("empty", None)
    now = now.after(*trained)
    assert now.step == "index"
    (tmp_path / "report").write_text(json.dumps({"outcome": "published"}))
    assert steps.index(now).outcome == "published"
    call = calls(tmp_path)[-1]
    assert call[call.index("--encoder") + 1] == str(first / "encoder")
    assert (first / "index.json").exists()

    write_result(first, "empty")
    assert steps.train(Round(3, {}, "start", step="train", iterations=2)).outcome == "empty"


def test_a_program_without_its_database_is_told_from_one_that_failed(
    steps: Steps, tmp_path: Path
) -> None:
    now = Round(1, {}, "start")
    (tmp_path / "code").write_text("69")
    with pytest.raises(PoolUnavailable, match=r"mine of round 1.*round-000001-mine\.log"):
        steps.mine(now)
    (tmp_path / "code").write_text("1")
    with pytest.raises(ChildFailed) as failed:
        steps.mine(now)
    assert failed.value.code == 1


def test_a_report_says_that_the_database_was_away_where_exit_codes_are_lost(
    steps: Steps, tmp_path: Path
) -> None:
    """As accelerate loses them."""
    now = Round(3, {}, "start", step="index")
    (tmp_path / "run/training/000003").mkdir(parents=True)
    (tmp_path / "code").write_text("1")
    (tmp_path / "report").write_text(json.dumps({"outcome": DATABASE_AWAY}))
    with pytest.raises(PoolUnavailable, match="index of round 3"):
        steps.index(now)
    (tmp_path / "report").unlink()
    with pytest.raises(ChildFailed):  # it fails for another reason: what stood there is old
        steps.index(now)
    (tmp_path / "code").write_text("0")
    (tmp_path / "report").write_text(json.dumps({"outcome": "published"}))
    assert steps.index(now).outcome == "published"
    assert len(calls(tmp_path)) == 3


@pytest.mark.parametrize(("step", "role"), [("mine", "mining"), ("index", "index")])
def test_the_loop_waits_for_who_does_the_same_by_hand(
    steps: Steps, config: Config, tmp_path: Path, step: str, role: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "run/training/000001").mkdir(parents=True)
    if step == "index":
        (tmp_path / "report").write_text(json.dumps({"outcome": "published"}))
    now = Round(1, {}, "start")
    told = f"another {role} is running there"
    with ThreadPoolExecutor(1) as threads:
        with run_lock(config.run.dir, role):
            waiting = threads.submit(getattr(steps, step), now)
            deadline = time.monotonic() + 30
            while told not in (said := capsys.readouterr().err):
                assert time.monotonic() < deadline and not waiting.done()
                time.sleep(0.01)
            assert "; the loop waits for it" in said
            assert not (tmp_path / "calls.jsonl").exists()
        waiting.result(60)
    assert len(calls(tmp_path)) == 1


def test_a_loop_that_waits_for_its_turn_stops_when_asked(steps: Steps, config: Config) -> None:
    steps._stop.set()
    with run_lock(config.run.dir, "mining"), pytest.raises(Stopped):
        steps.mine(Round(1, {}, "start"))


def test_what_fails_in_a_refresh_is_told_and_left_to_a_later_round(
    steps: Steps, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = Round(3, {}, "start")
    steps.refresh(now)
    assert calls(tmp_path) == [["index.py", "--set", "a=b", "--refresh"]]
    (tmp_path / "code").write_text("1")
    steps.refresh(now)
    assert "stays as it is: " in (told := capsys.readouterr().err) and "round-000003-index" in told
    (tmp_path / "code").write_text(str(EXIT_DATABASE_AWAY))
    with pytest.raises(PoolUnavailable):
        steps.refresh(now)
