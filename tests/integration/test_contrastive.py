"""train/contrastive.py as a user runs it: whole runs, stopped runs, several processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import psutil
import pytest
from safetensors.torch import load_file

from memshare.files import run_lock
from memshare.records import Example
from memshare.retrieval.encoder import Encoder
from memshare.training import checkpoint
from memshare.training.optimizer import lr_factor
from tests.tiny import tiny_encoder
from tests.training_data import candidate, example, examples, unlearnable, write_round
from tests.training_runs import (
    PROGRAM,
    launch,
    load_program,
    options,
    result,
    start,
    steps_saved,
    wait_for,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny encoder and two rounds of examples."""
    folder = tmp_path_factory.mktemp("contrastive")
    tiny_encoder(folder / "encoder")
    write_round(folder / "round-1", examples(60))
    write_round(folder / "round-2", examples(40, start=60))
    return folder


def logged(output: Path) -> list[dict[str, float]]:
    keys = ("step", "loss", "lr", "grad_norm")
    lines = (output / "log.jsonl").read_text().splitlines()
    return [{key: json.loads(line)[key] for key in keys} for line in lines]


@pytest.fixture(scope="module")
def program() -> ModuleType:
    return load_program()


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


@pytest.fixture(scope="module")
def one(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of all modes of gradient_worker.py."""
    from tests.integration import gradient_worker

    folder = tmp_path_factory.mktemp("one")
    gradient_worker.main(base / "encoder", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "divided"), [(2, False), (4, False), (2, True)], ids=["2", "4", "2-fsdp"]
)
def test_gradients_of_several_processes_are_those_of_one(
    base: Path, one: Path, tmp_path: Path, processes: int, divided: bool
) -> None:
    from tests.integration import gradient_worker

    many = tmp_path / "many"
    many.mkdir()
    worker = Path(str(gradient_worker.__file__))
    arguments = [str(base / "encoder"), str(many)]
    with launch(processes, worker, arguments, divided=divided) as process:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    for name in gradient_worker.BATCHES:
        for mode in gradient_worker.MODES:
            want = load_file(one / f"{name}-{mode}-0.safetensors")
            largest = max(float(g.abs().max()) for g in want.values())
            assert largest > 1e-3
            for rank in range(processes):
                got = load_file(many / f"{name}-{mode}-{rank}.safetensors")
                assert got.keys() == want.keys()
                assert max(float((got[n] - want[n]).abs().max()) for n in want) < 1e-5
                losses = (json.loads((f / f"{name}-{mode}-{r}.json").read_text())
                          for f, r in ((one, 0), (many, rank)))  # fmt: skip
                assert next(losses) == pytest.approx(next(losses), abs=1e-5)
    for mode, (name, _) in gradient_worker.REPLAYED.items():
        plain = load_file(one / f"thirteen-{name}-0.safetensors")
        for folder, rank in [(one, 0), *((many, rank) for rank in range(processes))]:
            got, again = (
                load_file(folder / f"{graphs}-{mode}-{rank}.safetensors")
                for graphs in gradient_worker.GRAPHS
            )
            assert got.keys() == again.keys() == plain.keys()
            assert all(got[n].equal(again[n]) for n in got), (mode, rank)
            largest = max(float(g.abs().max()) for g in plain.values())
            apart = max(float((got[n] - plain[n]).abs().max()) for n in got) / largest
            if "dropout" in mode:
                assert apart > 0.1  # it is on
            else:
                assert 1e-5 < apart < 1e-2  # rounded, and no more than that
    for rank in range(processes):
        told = (many / f"different-{rank}.txt").read_text()
        assert "see other examples than process 0" in told


@pytest.fixture(scope="module")
def alone(base: Path, tmp_path_factory: pytest.TempPathFactory, program: ModuleType) -> Path:
    """What one process trains, undisturbed."""
    output = tmp_path_factory.mktemp("alone") / "out"
    assert program.main(options(base, output, "--set=training.dropout=false", steps=40)) == 0
    return output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "divided"), [(2, False), (2, True), (4, False)],
    ids=["2-ddp-then-fsdp", "2-fsdp-then-ddp", "4-ddp-then-fsdp"],
)  # fmt: skip
def test_several_processes_train_as_one_and_survive_a_killed_one(
    base: Path, alone: Path, tmp_path: Path, processes: int, divided: bool
) -> None:
    """A checkpoint says nothing of how the processes divide the work: the other way goes on."""
    many = tmp_path / "many"
    share = f"--set=training.batch_size={8 // processes}"
    arguments = options(base, many, "--set=training.dropout=false", share, steps=40)
    with launch(processes, PROGRAM, arguments, divided=divided) as process:
        wait_for(lambda: bool(steps_saved(many)), process)
        workers = [p for p in psutil.Process(process.pid).children() if str(PROGRAM) in p.cmdline()]
        assert len(workers) == processes
        workers[-1].kill()
        _, errors = process.communicate(timeout=120)  # it ends, and does not hang
        assert process.returncode != 0 and "SIGKILL" in errors
        psutil.wait_procs(workers, timeout=30)
    assert not (many / "encoder").exists()
    with launch(processes, PROGRAM, arguments, divided=not divided) as process:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    assert "continuing from" in errors
    assert f"processes x queries a step: {processes} x {8 // processes} = 8;" in errors
    for got, want in zip(logged(many), logged(alone), strict=True):
        assert got == pytest.approx(want, abs=1e-3)
    ours, theirs = (load_file(f / "encoder" / "model.safetensors") for f in (many, alone))
    assert max(float((ours[n] - theirs[n]).abs().max()) for n in theirs) < 1e-4


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


@pytest.mark.parametrize(("number", "peak"), [(1, 1e-3), (2, 5e-4)])
def test_a_later_round_learns_more_slowly_where_asked_to(
    base: Path, tmp_path: Path, program: ModuleType, number: int, peak: float
) -> None:
    output = tmp_path / "out"
    more = ("--set=training.round_lr_decay=0.5", "--set=training.log_every=1")
    assert program.main([*options(base, output, *more, steps=4), "--round", str(number)]) == 0
    want = [peak * lr_factor(step, 4, 0.1, "linear") for step in range(4)]
    assert [line["lr"] for line in logged(output)] == pytest.approx(want) and max(want) == peak


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
    first = result(output)
    changed = [*options(base, output, steps=5), "--set=training.temperature=0.1"]
    changed.append("--set=training.log_every=1")  # changes nothing of the training: allowed
    assert program.main(changed) == 1
    told = capsys.readouterr().err
    assert "training.temperature: 0.05 -> 0.1" in told and "steps: 3 -> 5" in told
    assert "log_every" not in told
    assert result(output) == first  # nothing of the finished run was touched
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


@pytest.mark.slow
def test_several_processes_end_an_empty_round_together(base: Path, tmp_path: Path) -> None:
    write_round(tmp_path / "round", unlearnable(20))
    output = tmp_path / "out"
    arguments = [*options(base, output), "--examples", str(tmp_path / "round")]
    with launch(2, PROGRAM, arguments) as process:
        _, errors = process.communicate(timeout=120)
    assert process.returncode != 0  # accelerate's, for 66
    assert errors.count("error: no query has a negative") == 1, errors
    assert result(output)["status"] == "empty" and not (output / "encoder").exists()


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


@pytest.mark.parametrize("every", [1, 5])
def test_divergence_names_the_batch_and_keeps_the_last_checkpoint(
    base: Path, tmp_path: Path, program: ModuleType, capsys: pytest.CaptureFixture[str], every: int
) -> None:
    output, often = tmp_path / "out", f"--set=training.checkpoint_every={every}"
    assert program.main(options(base, output, often, steps=5)) == 0
    kept = checkpoint.latest_intact(output / "checkpoints")
    wild = [*options(base, output, often), "--set=training.lr=1e38", "--allow-config-change"]
    assert program.main(wild) == 1
    told = capsys.readouterr().err
    assert "is not finite; the batch's queries are main-" in told
    assert told.endswith(f"; the last good weights are in {kept}\n")
    assert result(output)["status"] == "failed"
    assert checkpoint.latest_intact(output / "checkpoints") == kept
    assert (output / "encoder").exists()  # the earlier one
    assert program.main([*options(base, output, often, steps=8), "--allow-config-change"]) == 0
    assert f"continuing from {kept}" in capsys.readouterr().err
    assert result(output)["steps"] == 8


@pytest.mark.parametrize("end", ["last step", "stopped", "evaluated"])
def test_weights_that_no_further_step_judges_are_judged_at_the_end(
    base: Path, tmp_path: Path, program: ModuleType, capsys: pytest.CaptureFixture[str], end: str
) -> None:
    output, stop = tmp_path / "out", tmp_path / "stop"
    arguments = options(
        base, output, "--set=training.lr=1e38", "--set=training.checkpoint_every=1",
        "--stop-file", str(stop), steps=1 if end == "last step" else 60,
    )  # fmt: skip
    if end == "stopped":
        stop.touch()
    if end == "evaluated":
        arguments += ["--set=training.eval_every=1", "--held-out", str(base / "round-2")]
    assert program.main(arguments) == 1
    told = capsys.readouterr().err
    assert "step 1: what the encoder gives after it is not finite" in told
    assert told.endswith("; no checkpoint is left\n")
    assert result(output)["status"] == "failed"
    assert not (output / "encoder").exists() and steps_saved(output) == []


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--set=training.lrr=1", "--set=training.epochs=no"], 2, ["training.lrr", "epochs"]),
        (["--encoder", "/no/such/folder"], 1, ["/no/such/folder"]),
        (["--examples", "/no/such/round"], 1, ["/no/such/round"]),
        (["--output", f"{__file__}/out"], 1, [f"--output {__file__}/out", "Not a directory"]),
        (["--resume"], 1, ["no intact checkpoint"]),
        (["--set=training.matryoshka=[16, 32]"], 2, ["training.matryoshka: [32]", "less than 32"]),
        (["--set=training.matryoshka=[48]", "--dry-run"], 2, ["training.matryoshka: [48]"]),
    ],
    ids=["config", "encoder", "examples", "output", "resume", "width", "width-dry-run"],
)
def test_bad_input(
    base: Path, tmp_path: Path, program: ModuleType, capsys: pytest.CaptureFixture[str],
    more: list[str], code: int, words: list[str],
) -> None:  # fmt: skip
    assert program.main([*options(base, tmp_path / "out"), *more]) == code
    told = capsys.readouterr().err
    assert "error: " in told and all(word in told for word in words)


def test_a_wrong_wandb_mode_is_told_before_anything_starts(
    base: Path, tmp_path: Path, program: ModuleType, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("WANDB_MODE", "foo")
    assert program.main([*options(base, tmp_path / "out"), "--set=wandb.mode=auto"]) == 2
    [told] = capsys.readouterr().err.splitlines()
    assert "error: WANDB_MODE is foo; W&B knows online" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", ["0", "-5", "x"])
def test_rounds_count_from_one(
    base: Path, tmp_path: Path, program: ModuleType, capsys: pytest.CaptureFixture[str], number: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        program.main([*options(base, tmp_path / "out"), "--round", number])
    assert "argument --round: " in capsys.readouterr().err


def test_a_second_training_into_the_same_folder_is_refused(
    base: Path, tmp_path: Path, program: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    with run_lock(output, "training"):
        assert program.main(options(base, output)) == 1
    told = capsys.readouterr().err
    assert "another training is running" in told and "its own --output" in told
    assert not (output / "result.json").exists()
