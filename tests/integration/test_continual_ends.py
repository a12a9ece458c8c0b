"""The continual loop with its real programs: stopped, failing, refused, rejected, empty."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

import pytest

from memshare.retrieval.generation import current
from memshare.training.journal import Journal, Round, Span
from tests.continual_runs import DATA, banking

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"MEMSHARE_DATA: no {DATA}"),
]


def test_stops_cleanly_and_refuses_a_second_loop(make_run: Any) -> None:
    run = make_run()
    child = run.start()
    run.wait(child, lambda: (run.folder / "continual.lock").exists())
    time.sleep(0.5)
    other = run.start()
    assert "another continual is running" in other.communicate(timeout=60)[1]
    assert other.returncode == 1
    run.store.append(banking(0, 8))
    run.wait(child, lambda: bool(run.rounds()) and run.rounds()[-1]["step"] == "train")
    record = run.folder / "continual.child.json"
    run.wait(child, record.exists)
    session = json.loads(record.read_text())["session"]
    child.send_signal(signal.SIGTERM)
    errors = child.communicate(timeout=60)[1]
    assert "stopped" in errors and errors.count("waiting until 30 memories are new") == 1
    assert child.returncode == 0
    assert run.rounds()[-1]["step"] == "train" and not record.exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(session, 0)


def test_a_failing_step_is_told_with_its_log(make_run: Any) -> None:
    run = make_run(training={"lr": 1e30}, mining={"dense_candidates": 0})
    run.store.append(banking(0, 8))
    child = run.start("--once")
    errors = child.communicate(timeout=100)[1]
    assert child.returncode == 1
    assert "contrastive.py" in errors and "is not finite" in errors
    assert run.rounds()[-1]["step"] == "train"


def test_a_launch_that_cannot_be_is_told_at_once(make_run: Any) -> None:
    run = make_run()
    child = run.start("--once", "--set", "continual.accelerate_config=nope.yaml")
    errors = child.communicate(timeout=60)[1]
    assert child.returncode == 2
    assert "continual.accelerate_config: no file nope.yaml, seen from" in errors


@pytest.mark.parametrize(("sections", "told"), [
    ({"encoder": {"model": "/no/such/encoder"}}, "/no/such/encoder"),
    ({"training": {"matryoshka": [8, 500]}}, "training.matryoshka: [500] must be less than 32"),
    ({"training": {"lora": {"enabled": True, "target_modules": ["nothing"]}}},
     "training.lora.target_modules ('nothing',) fits no module"),
])  # fmt: skip
def test_what_cannot_be_trained_is_told_before_anything_is_mined(
    make_run: Any, sections: dict[str, Any], told: str
) -> None:
    run = make_run(**sections)
    run.store.append(banking(0, 8))
    child = run.start("--once")
    errors = child.communicate(timeout=60)[1]
    assert child.returncode == 1 and f"error: {told}" in errors, errors
    assert not run.rounds() and not [*(run.folder / "examples").rglob("*.parquet")]


@pytest.mark.parametrize("step", ["done", "mine"])
def test_a_later_start_finds_out_before_it_mines_as_well(make_run: Any, step: str) -> None:
    """Between two rounds, and in one that an earlier start has put on record."""
    run = make_run()
    run.store.append(banking(0, 8))
    outcome = "empty" if step == "done" else None
    before = Round(1, {"main": Span(0, 0)}, str(run.folder / "tiny"), step, outcome)  # type: ignore[arg-type]
    Journal((before,)).save(run.folder / "continual.json")
    child = run.start("--once", "--set", "training.matryoshka=[8, 500]")
    errors = child.communicate(timeout=60)[1]
    assert child.returncode == 1 and "error: training.matryoshka: [500]" in errors, errors
    assert [item["step"] for item in run.rounds()] == [step]
    assert not [*(run.folder / "examples").rglob("*.parquet")]


def test_a_current_generation_that_can_not_be_read_is_told(make_run: Any) -> None:
    run = make_run()
    run.store.append(banking(0, 8))
    home = run.config.retriever_dir
    home.mkdir(parents=True)
    (home / "CURRENT").write_text("not one of ours")
    child = run.start("--once")
    errors = child.communicate(timeout=60)[1]
    assert child.returncode == 1 and "Traceback" not in errors, errors
    assert f"error: {home / 'CURRENT'}" in errors, errors


def test_rejected_and_empty_rounds_are_on_record(make_run: Any) -> None:
    run = make_run(split={"held_out": 1.0})
    run.store.append(banking(0, 8))
    assert run.start("--once").wait(100) == 0
    assert run.rounds()[-1]["outcome"] == "empty"  # every new memory was held out
    assert "train" not in run.rounds()[-1]["results"]
    assert "--refresh" in (run.folder / "logs" / "round-000001-index.log").read_text()

    run = make_run(gate={"margin": 0.0, "resamples": 200}, training={"lr": 1.0, "max_steps": 6})
    run.store.append(banking(0, 20))
    assert run.start("--once").wait(150) == 0
    assert run.rounds()[-1]["outcome"] == "rejected"
    home = run.config.retriever_dir
    assert current(home) is None
    (line,) = (home / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["gate"]["passed"] is False


def test_a_pool_is_kept_under_its_cap(make_run: Any) -> None:
    run = make_run(
        pools={"main": {"max_memories": 20, "prune_by": "near-duplicates"}},
        continual={"min_new": 1000},
    )
    run.store.append(banking(0, 4))
    child = run.start()
    run.wait(child, lambda: run.store.stats("main").memories == 19)
    run.store.append(banking(4, 5))
    run.wait(child, lambda: run.store.stats("main").memories == 19)
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=60) == 0
    assert run.store.stats("main").deleted == 24 + 6 - 19
    wrong = make_run(pools={"main": {"max_memories": 20, "prune_by": "luck"}})
    child = wrong.start()
    assert "pools.main.prune_by: no pruning policy 'luck'" in child.communicate(timeout=60)[1]
    assert child.returncode == 1
