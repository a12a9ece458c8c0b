"""train/contrastive.py as a user runs it: whole runs, stopped and resumed ones."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file

from memshare.records import Example
from memshare.retrieval.encoder import Encoder
from memshare.training import checkpoint
from memshare.training.optimizer import lr_factor
from tests.training_data import candidate, example, examples, unlearnable, write_round
from tests.training_runs import (
    PROGRAM,
    launch,
    logged,
    options,
    result,
    start,
    steps_saved,
    wait_for,
)


@pytest.mark.slow
def test_a_run_stopped_in_every_way_ends_as_the_uninterrupted_one(
    base: Path, tmp_path: Path
) -> None:
    """SIGKILL, SIGTERM, then a damaged checkpoint: equal weights, bit for bit."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with start(options(base, whole, steps=100)) as process:
        assert process.wait(timeout=240) == 0, process.communicate()

    arguments = options(base, broken, "--set=wandb.mode=offline", steps=100)
    with start(arguments) as process:
        wait_for(lambda: bool(steps_saved(broken)), process)
        process.kill()
    assert not (broken / "result.json").exists()
    reached = steps_saved(broken)[-1]
    with start(arguments) as process:
        wait_for(lambda: steps_saved(broken)[-1] > reached, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 75, process.communicate()
    said = result(broken)
    assert said["status"] == "stopped" and said["steps"] == steps_saved(broken)[-1]
    ids = {said["wandb"]["id"]}  # type: ignore[index]
    assert not (broken / "encoder").exists()
    assert steps_saved(broken)[-1] < 100, "the run ended before it could be stopped"

    *_, last = checkpoint.checkpoints(broken / "checkpoints")
    os.truncate(last / "model.safetensors", 1000)
    with start([*arguments, "--resume"]) as process:
        _, said_last = process.communicate(timeout=240)
        assert process.returncode == 0, said_last
    assert "damaged checkpoint" in said_last or "has another size" in said_last
    ids.add(result(broken)["wandb"]["id"])  # type: ignore[index]
    assert len(ids) == 1  # one W&B run throughout
    for name in ("loss", "steps", "tokens", "real_token_share", "examples"):
        assert result(broken)[name] == result(whole)[name]
    ours, theirs = (load_file(f / "encoder" / "model.safetensors") for f in (broken, whole))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert [line for line in logged(broken) if line["step"] % 5 == 0] == logged(whole)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_saves_where_it_stands(base: Path, tmp_path: Path, processes: int) -> None:
    output = tmp_path / "out"
    seldom = ("--set=training.checkpoint_every=100000", "--set=training.log_every=1")
    arguments = options(base, output, *seldom, steps=100_000)
    run = start(arguments) if processes == 1 else launch(processes, PROGRAM, arguments)
    with run as process:
        wait_for(lambda: (output / "log.jsonl").exists() and len(logged(output)) > 2, process)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    said = result(output)
    assert said["status"] == "stopped" and [said["steps"]] == steps_saved(output)
    assert told.count("stopping after this step") == processes
    if processes == 1:  # a launcher has tracebacks and codes of its own
        assert process.returncode == 75 and "Traceback" not in told


def test_lora_and_two_rounds_in_one_run(base: Path, tmp_path: Path, program: ModuleType) -> None:
    output = tmp_path / "out"
    code = program.main([
        *options(base, output, steps=5), "--examples", str(base / "round-1"),
        str(base / "round-2"), str(base / "round-2"), "--round", "2",
        "--set=training.lora.enabled=true", "--set=training.lora.r=4",
    ])  # fmt: skip
    assert code == 0
    assert logged(output)[-1]["lr"] == pytest.approx(1e-3 * lr_factor(4, 5, 0.1, "linear"))
    said = result(output)
    # a query that was mined twice counts once
    assert (said["status"], said["examples"]) == ("trained", 100)
    assert said["steps"] == 5 and 0.5 < float(str(said["real_token_share"])) <= 1.0
    [saved] = checkpoint.checkpoints(output / "checkpoints")
    names = load_file(saved / "model.safetensors").keys()
    assert names and all("lora_" in name for name in names)
    trained, before = (
        Encoder.from_folder(f, "cpu") for f in (output / "encoder", base / "encoder")
    )
    assert trained.model.state_dict().keys() == before.model.state_dict().keys()
    assert trained.query_fingerprint() != before.query_fingerprint()


def test_a_later_round_has_its_own_seed_and_learns_more_slowly_where_asked_to(
    base: Path, tmp_path: Path, program: ModuleType
) -> None:
    seeds = set()
    more = ("--set=training.round_lr_decay=0.5", "--set=training.log_every=1")
    for number, peak in ((1, 1e-3), (2, 5e-4)):
        output = tmp_path / str(number)
        assert program.main([*options(base, output, *more, steps=4), "--round", str(number)]) == 0
        want = [peak * lr_factor(step, 4, 0.1, "linear") for step in range(4)]
        assert [line["lr"] for line in logged(output)] == pytest.approx(want) and max(want) == peak
        seeds.add(result(output)["seed"])
    assert len(seeds) == 2


def test_query_only_resumes_to_the_same_bits_and_keeps_the_memory_tower(
    base: Path, tmp_path: Path, program: ModuleType
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    more = ("--set=training.towers=query-only", "--set=training.checkpoint_every=10")
    assert program.main(options(base, whole, *more, steps=20)) == 0
    shutil.copytree(whole, broken)
    checkpoint.discard(broken / "checkpoints", after=10)
    shutil.rmtree(broken / "encoder")
    assert steps_saved(broken) == [10]
    assert program.main([*options(base, broken, *more, steps=20), "--resume"]) == 0
    weights = "query_0_Transformer/model.safetensors"
    ours, theirs = (load_file(f / "encoder" / weights) for f in (broken, whole))
    assert all(ours[name].equal(theirs[name]) for name in ours)
    before, after = (Encoder.from_folder(f / "encoder") for f in (base, whole))
    assert after.two_towers and after.memory_fingerprint() == before.memory_fingerprint()
    assert after.query_fingerprint() != before.query_fingerprint()
    assert (
        program.main(options(base, tmp_path / "shared", "--encoder", str(whole / "encoder"))) == 1
    )
    told = str(result(tmp_path / "shared")["error"])
    assert "training.towers" in told


def test_run_again_after_the_end(base: Path, tmp_path: Path, program: ModuleType) -> None:
    output = tmp_path / "out"
    assert program.main(options(base, output, steps=3)) == 0
    first, weights = result(output), (output / "encoder" / "model.safetensors").read_bytes()
    assert program.main(options(base, output, steps=3)) == 0
    assert (output / "encoder" / "model.safetensors").read_bytes() == weights
    assert {**result(output), "wandb": None} == {**first, "wandb": None}
    assert program.main([*options(base, output, steps=3), "--resume", "never"]) == 0
    assert (output / "encoder" / "model.safetensors").read_bytes() == weights  # same seed


def test_changed_configuration_is_refused_unless_told(
    base: Path, tmp_path: Path, program: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert program.main(options(base, output, steps=3)) == 0
    first, written = result(output), (output / "result.json").stat().st_mtime_ns
    changed = [*options(base, output, steps=5), "--set=training.temperature=0.1"]
    changed.append("--set=training.log_every=1")  # changes nothing of the training: allowed
    assert program.main(changed) == 1
    told = capsys.readouterr().err
    assert "training.temperature: 0.05 -> 0.1" in told and "steps: 3 -> 5" in told
    assert "log_every" not in told
    assert result(output) == first  # nothing of the finished run was touched
    assert (output / "result.json").stat().st_mtime_ns == written
    assert program.main([*changed, "--allow-config-change"]) == 0
    assert result(output)["steps"] == 5


def test_an_empty_round_has_its_own_exit_code(
    base: Path, tmp_path: Path, program: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [example("a"), example("b", candidates=(candidate("c", "c", -9.0),))]
    write_round(tmp_path / "round", bad)
    output = tmp_path / "out"
    code = program.main([*options(base, output), "--examples", str(tmp_path / "round")])
    assert code == 66
    assert result(output) == {
        "status": "empty", "examples": 0, "without_hard_negatives": 0,
        "dropped": {"no candidates": 1, "no positive beats the baseline": 1},
        "pools": {}, "labels": [], "scorers": [], "why": "no usable example, nothing to train on",
    }  # fmt: skip
    assert "no usable example" in capsys.readouterr().err
    assert not (output / "encoder").exists()


@pytest.mark.parametrize(
    "made",
    [
        unlearnable(1),
        unlearnable(20),
        [example("a", candidates=(candidate("c", "c", -0.5),))],  # the only memory
    ],
    ids=["one-example", "one-answer", "one-memory"],
)
def test_what_has_no_negatives_is_an_empty_round(
    base: Path, tmp_path: Path, program: ModuleType, capsys: pytest.CaptureFixture[str],
    made: list[Example],
) -> None:  # fmt: skip
    write_round(tmp_path / "round", made)
    output = tmp_path / "out"
    arguments = [*options(base, output), "--examples", str(tmp_path / "round")]
    assert program.main([*arguments, "--dry-run"]) == 66 and not output.exists()
    assert program.main(arguments) == 66
    said = result(output)
    assert (said["status"], said["examples"]) == ("empty", len(made))
    assert "no query has a negative" in str(said["why"])
    assert capsys.readouterr().err.count("error: no query has a negative in its batch") == 2
    assert not (output / "encoder").exists() and not (output / "checkpoints").exists()


def test_steps_without_negatives_are_skipped_and_counted_also_over_a_resume(
    base: Path, tmp_path: Path, program: ModuleType
) -> None:
    """Two pools, one of which has nothing to teach: its batches change nothing."""
    bare = [replace(one, pool="bare") for one in unlearnable(8)]
    write_round(tmp_path / "round", [*examples(8), *bare])
    more = ["--examples", str(tmp_path / "round"), "--set=training.log_every=1"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert program.main([*options(base, whole, steps=12), *more]) == 0
    said = result(whole)
    assert (said["status"], said["steps"]) == ("trained", 12)
    assert (said["skipped_steps"], said["share_without_negatives"]) == (6, 0.5)
    still = [line for line in logged(whole) if line["grad_norm"] == 0]
    assert len(still) == 6 and all(line["loss"] == 0 for line in still)
    shutil.copytree(whole, broken)
    checkpoint.discard(broken / "checkpoints", after=10)
    assert steps_saved(broken) == [10]
    assert program.main([*options(base, broken, steps=12), *more, "--resume"]) == 0
    assert result(broken)["skipped_steps"] == 6
    ours, theirs = (load_file(f / "encoder" / "model.safetensors") for f in (broken, whole))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_dry_run_tells_and_writes_nothing(
    base: Path, tmp_path: Path, program: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert program.main([*options(base, output), "--dry-run"]) == 0
    told, logged = capsys.readouterr()
    assert "processes x queries a step: 1 x 8 = 8; 8 steps an epoch" in logged
    assert "max_steps: 60" in told and "60 examples, 60 steps" in told
    assert "parameters" in told and "memory per process" in told
    assert told.splitlines()[-1] == "precision: float32"
    assert not output.exists()
