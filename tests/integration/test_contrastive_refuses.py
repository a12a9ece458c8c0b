"""train/contrastive.py and what can't be trained: refused or stopped, and told in a line."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

from memshare.files import run_lock
from memshare.training import checkpoint
from tests.training_runs import (
    options,
    result,
    steps_saved,
)


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


@pytest.mark.parametrize("place", ["FrozenMemories.of", "spread", "ContrastiveStep.backward"])
def test_a_device_that_is_full_is_told_wherever_it_happens(
    base: Path, tmp_path: Path, program: ModuleType, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, place: str,
) -> None:  # fmt: skip
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has some.")

    name, _, method = place.partition(".")
    if method:
        monkeypatch.setattr(getattr(program, name), method, full)
    else:
        monkeypatch.setattr(program, name, full)
    output = tmp_path / "out"
    assert program.main(options(base, output, steps=2)) == 1
    told = "CUDA out of memory. Tried to allocate 2 GiB. Lower training.graph_tokens"
    assert f"error: {told}" in capsys.readouterr().err
    ended = result(output)
    assert ended["status"] == "failed" and str(ended["error"]).startswith(told)


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
