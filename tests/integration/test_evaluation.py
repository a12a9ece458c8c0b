"""train/contrastive.py with evaluation while training: what it exports, and after a kill."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from memshare.files import sha256_file
from memshare.retrieval.encoder import Encoder
from memshare.training import checkpoint
from memshare.training.evaluate import HeldOut, evaluate
from memshare.training.examples import held_out_dir, read_examples, write_shard
from memshare.training.gather import World
from tests.tiny import tiny_encoder
from tests.training_data import examples, write_round
from tests.training_runs import (
    PROGRAM,
    launch,
    load_program,
    options,
    result,
    steps_saved,
)

EVERY_2 = "--set=training.eval_every=2"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder, and a round of examples with held-out ones."""
    folder = tmp_path_factory.mktemp("evaluation")
    tiny_encoder(folder / "encoder")
    write_round(folder / "round-1", examples(60))
    write_round(held_out_dir(folder / "round-1"), examples(24, seed=1, start=1000))
    return folder


@pytest.fixture(scope="module")
def program() -> ModuleType:
    return load_program()


def evaluations(output: Path) -> dict[int, dict[str, float]]:
    lines = map(json.loads, (output / "log.jsonl").read_text().splitlines())
    return {
        line["step"]: {name[5:]: value for name, value in line.items() if name != "step"}
        for line in lines
        if "eval/nDCG@10" in line
    }


def said(output: Path) -> dict[str, Any]:
    found = result(output)["evaluation"]
    assert isinstance(found, dict)
    return found


def exported(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "encoder" / "model.safetensors")


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)


@pytest.mark.parametrize("dropout", ["true", "false"])
def test_evaluation_changes_nothing_of_the_training(
    base: Path, tmp_path: Path, program: ModuleType, dropout: str
) -> None:
    """Equal weights bit for bit after the last step; and the same exported, where it is best."""
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    same_dropout = f"--set=training.dropout={dropout}"
    assert program.main(options(base, plain, same_dropout, steps=12)) == 0
    assert program.main(options(base, watched, same_dropout, EVERY_2, steps=12)) == 0
    assert result(plain)["evaluation"] is None
    assert list(evaluations(watched)) == [0, 2, 4, 6, 8, 10, 12]
    last = [output / "checkpoints" / "step-00000012" for output in (plain, watched)]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert sha256_file(last[0] / name) == sha256_file(last[1] / name)
    assert (last[1] / "best.safetensors").exists() and not (last[0] / "best.safetensors").exists()


def test_the_best_step_is_exported(base: Path, tmp_path: Path, program: ModuleType) -> None:
    output = tmp_path / "out"
    assert program.main(options(base, output, EVERY_2, steps=15)) == 0
    looked, told = evaluations(output), said(output)
    assert list(looked) == [0, 2, 4, 6, 8, 10, 12, 14, 15]  # and after the last one
    best = max(looked, key=lambda step: looked[step]["nDCG@10"])
    assert told["best_step"] == best > 0
    assert (told["best"], told["start"]) == (looked[best], looked[0])
    assert told["best"]["nDCG@10"] > told["start"]["nDCG@10"]
    assert (told["queries"], told["stopped_early"]) == (24, False)
    held_out = HeldOut.of(read_examples(held_out_dir(base / "round-1")), 0.05)
    encoder = Encoder.from_folder(output / "encoder", "cpu")
    assert evaluate(held_out, encoder, World(torch.device("cpu"))) == looked[best]


@pytest.mark.parametrize("lora", ["false", "true"])
def test_training_that_only_harms_stops_early_and_exports_the_start(
    base: Path, tmp_path: Path, program: ModuleType, lora: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    wild = [
        EVERY_2, "--set=training.lr=3", "--set=training.patience=3",
        f"--set=training.lora.enabled={lora}", "--set=training.max_grad_norm=1e9",
    ]  # fmt: skip
    assert program.main(options(base, output, *wild, steps=40)) == 0
    told = said(output)
    assert (result(output)["status"], told["best_step"], told["stopped_early"]) == (
        "trained", 0, True,
    )  # fmt: skip
    assert result(output)["steps"] == 6 and list(evaluations(output)) == [0, 2, 4, 6]
    assert told["best"] == told["start"]
    assert "what is exported is what the training started from" in capsys.readouterr().err
    before = load_file(base / "encoder" / "model.safetensors")
    assert same(exported(output), before)
    shutil.rmtree(output / "encoder")
    assert program.main(options(base, output, *wild, steps=40)) == 0  # it stays stopped
    assert result(output)["steps"] == 6 and same(exported(output), before)


def test_a_crash_at_every_second_step_changes_nothing(
    base: Path, tmp_path: Path, program: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best may be newer or older than the checkpoint found, or not be in it yet."""
    arguments = [EVERY_2, "--set=training.checkpoint_every=3", "--set=training.patience=2"]
    arguments.append("--set=training.lr=5e-3")
    whole = tmp_path / "whole"
    assert program.main(options(base, whole, *arguments, steps=14)) == 0
    steps = int(str(result(whole)["steps"]))
    assert 0 < said(whole)["best_step"] < steps - 1  # the best is not what training ended with

    class Crash(BaseException):
        pass

    real = program.ContrastiveStep.backward
    for at in range(0, steps, 2):  # before, at and after a checkpoint, which is every third

        def backward(self: Any, batch: Any, step: int, stop: bool, at: int = at) -> Any:
            if step == at:
                raise Crash
            return real(self, batch, step, stop)

        output = tmp_path / f"at-{at}"
        with monkeypatch.context() as patch:
            patch.setattr(program.ContrastiveStep, "backward", backward)
            with pytest.raises(Crash):
                program.main(options(base, output, *arguments, steps=14))
        assert steps_saved(output)[-1:] == ([at - at % 3] if at >= 3 else [])
        assert program.main(options(base, output, *arguments, steps=14)) == 0
        assert said(output) == said(whole) and evaluations(output) == evaluations(whole)
        assert same(exported(output), exported(whole))


@pytest.mark.slow
def test_two_processes_evaluate_as_one(base: Path, tmp_path: Path, program: ModuleType) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    settings = [EVERY_2, "--set=training.dropout=false", "--set=training.patience=2"]
    assert program.main(options(base, one, *settings, steps=40)) == 0
    arguments = options(base, two, *settings, "--set=training.batch_size=4", steps=40)
    with launch(2, PROGRAM, arguments) as process:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    for step, metrics in evaluations(one).items():
        assert evaluations(two)[step] == pytest.approx(metrics, abs=1e-9), step
    assert {**said(two), "best": None, "start": None} == {**said(one), "best": None, "start": None}
    ours, theirs = exported(two), exported(one)
    assert max(float((ours[n] - theirs[n]).abs().max()) for n in theirs) < 1e-4


def test_held_out_examples_are_never_trained_on(
    base: Path, tmp_path: Path, program: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    output, held_out = tmp_path / "out", held_out_dir(base / "round-1")
    assert program.main(options(base, output, "--examples", str(held_out), steps=2)) == 1
    assert "never trained on" in capsys.readouterr().err
    assert program.main(options(base, output, EVERY_2, steps=2)) == 0
    assert result(output)["examples"] == 60


def test_other_folders_to_evaluate_on(
    base: Path, tmp_path: Path, program: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_round(tmp_path / "other", [*examples(5, seed=2, start=2000), *examples(3)])
    more = ["--held-out", str(other)]
    output = tmp_path / "out"
    assert program.main(options(base, output, *more, steps=2)) == 1
    assert "without training.eval_every" in capsys.readouterr().err
    assert program.main(options(base, output, *more, EVERY_2, steps=2)) == 0
    assert said(output)["queries"] == 5  # the other three are training queries
    assert "3 trained on: left out" in capsys.readouterr().err
    assert program.main(options(base, output, "--held-out", "/no/such", EVERY_2, steps=2)) == 1
    assert "/no/such" in capsys.readouterr().err


def test_without_held_out_examples_training_goes_on(
    base: Path, tmp_path: Path, program: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = write_round(tmp_path / "alone", examples(10))
    more = ["--examples", str(alone), EVERY_2, "--set=training.patience=1"]
    assert program.main(options(base, tmp_path / "out", *more, steps=3)) == 0
    assert "evaluation: 0 held-out queries" in capsys.readouterr().err
    assert result(tmp_path / "out")["evaluation"] is None
    assert result(tmp_path / "out")["steps"] == 3


def test_other_held_out_examples_are_a_change(
    base: Path, tmp_path: Path, program: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """A best by other questions is no best; told to go on all the same, it is found anew."""
    output, other = tmp_path / "out", tmp_path / "other"
    assert program.main(options(base, output, EVERY_2, steps=4)) == 0
    stale = evaluations(output)
    shutil.copytree(held_out_dir(base / "round-1"), other)
    write_shard(other / "shard-00000.parquet", examples(6, seed=3, start=3000))
    changed = options(base, output, EVERY_2, "--held-out", str(other), steps=8)
    assert program.main(changed) == 1
    assert "held_out: " in capsys.readouterr().err
    assert program.main([*changed, "--allow-config-change"]) == 0
    assert said(output)["queries"] == 6 and list(evaluations(output)) == [0, 2, 4, 6, 8]
    [*_, last] = checkpoint.checkpoints(output / "checkpoints")
    best = checkpoint.read_state(last).best
    looked = evaluations(output)
    assert best is not None and best.step >= 4
    assert (best.metrics, best.start) == (looked[best.step], looked[4])
    assert looked[4] != stale[4]
    assert said(output)["best"] == best.metrics
