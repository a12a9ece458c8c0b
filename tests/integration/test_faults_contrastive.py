"""Faults of train/contrastive.py's surroundings: a full disk, a W&B that is away."""

from __future__ import annotations

import platform
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from safetensors.torch import load_file

from memshare.retrieval.encoder import Encoder
from memshare.training import checkpoint
from memshare.training.outcome import read_result
from tests.disks import small_disk
from tests.fake_wandb import fake_wandb
from tests.tiny import tiny_encoder
from tests.training_data import examples, write_round
from tests.training_runs import load_program, options, result, start, steps_saved, wait_for


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    tiny_encoder(folder / "encoder")
    write_round(folder / "round-1", examples(60))
    return folder


@pytest.fixture(scope="module")
def program() -> ModuleType:
    return load_program()


def test_a_disk_that_fills_up_while_the_encoder_is_exported(
    base: Path, tmp_path: Path, program: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """More and more room, so that every file of the encoder in turn is the one to fail.

    The weights come first, then tokenizer, settings and card, each by a library of its own.
    """
    lora = ("--set=training.lora.enabled=true", "--set=training.lora.r=2")  # small checkpoints
    whole = tmp_path / "whole"
    assert program.main(options(base, whole, *lora, steps=5)) == 0
    reasons: Counter[str] = Counter()
    with small_disk(tmp_path / "disk", "1m") as disk:
        output, ballast = disk / "out", disk / "ballast"
        for taken in (*range(712, 604, -12), 0):  # KiB
            ballast.write_bytes(b"\0" * taken * 1024)
            capsys.readouterr()
            if program.main(options(base, output, *lora, steps=5)) == 0:
                break
            told = capsys.readouterr().err
            assert "No space left on device" in told and "Traceback" not in told
            assert "Free some space and run the same command again" in told
            if not (output / "encoder").exists():
                assert "the trained encoder can't be written" in told
            # Nothing may be left for a result, be it that.
            assert (read_result(output) or {"status": "failed"})["status"] == "failed"
            assert steps_saved(output) == [5] and not list(output.glob(".encoder*"))
            assert checkpoint.latest_intact(output / "checkpoints") is not None
            reasons[told.rpartition("can't be written")[2]] += 1
        assert reasons.total() > 5, "the disk was hardly ever full"
        assert len(reasons) > 2, "the same file failed each time"
        assert result(output)["status"] == "trained"
        weights = [load_file(f / "encoder" / "model.safetensors") for f in (output, whole)]
        assert all(weights[0][name].equal(weights[1][name]) for name in weights[1])
        Encoder.from_folder(output / "encoder", "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["silent", "refused"])
def test_results_do_not_wait_for_a_wandb_that_is_away(
    base: Path, tmp_path: Path, kind: str
) -> None:
    """Silent: it was there at first, and then says nothing. Refused: it never was."""
    output = tmp_path / "out"
    arguments = options(base, output, "--set=wandb.mode=online", steps=60)
    with fake_wandb() as service:
        if kind == "refused":
            service.shutdown()
            service.server_close()
        environment = {"WANDB_BASE_URL": service.url, "WANDB_API_KEY": "0" * 40}
        with start(arguments, environment) as process:
            if kind == "silent":
                wait_for(lambda: service.opened > 0, process)
                service.silent.set()
            wait_for(lambda: (output / "result.json").exists(), process)
            written = time.monotonic()
            _, told = process.communicate(timeout=60)
            seconds = time.monotonic() - written
    assert process.returncode == 0, told
    assert seconds < 12.0, told  # W&B's own threads and hooks, and the end of the interpreter
    assert result(output)["status"] == "trained" and (output / "encoder").exists()
    wanted = {"silent": "W&B did not finish in time", "refused": "W&B can't be reached"}
    assert wanted[kind] in told and "Traceback" not in told
    assert list(output.glob("wandb/*run-*/run-*.wandb"))


def test_the_run_at_wandb_has_the_whole_configuration_and_no_secrets(
    base: Path, tmp_path: Path, program: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    arguments = options(
        base, output, "--set=wandb.mode=online", "--set=training.distill_weight=0.5",
        "--set=database_url=postgresql+psycopg://writer:s3cret@db/pool",
        "--set=agent_llm.server.env.HF_TOKEN=s3cret", "--set=agent.instruction=be-brief", steps=6,
    )  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(program.__file__), *arguments])
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with fake_wandb() as service:
        monkeypatch.setenv("WANDB_BASE_URL", service.url)
        assert program.main(arguments) == 0
        sent = b"".join(service.received)
    kept = [path for path in output.glob("wandb/**/*") if path.is_file()]
    assert kept and b"s3cret" not in sent
    assert not [path for path in kept if b"s3cret" in path.read_bytes()]
    config = yaml.safe_load(next(output.glob("wandb/run-*/files/config.yaml")).read_text())
    assert config["database_url"]["value"] == "postgresql+psycopg://writer:***@db/pool"
    assert config["agent"]["value"]["instruction"] == "be-brief"
    assert config["training"]["value"]["max_steps"] == 6
    facts = config["run_facts"]["value"]
    assert facts["round"] == 1 and facts["processes"] == 1 and facts["steps"] == 6
    assert facts["device"] == "cpu" and facts["nodes"] == 1
    assert facts["hosts"] == [platform.node()]  # W&B's own word of it is off
    for figure in (b"loss/info_nce", b"loss/kl", b"grad_norm", b"tokens_per_second"):
        assert figure in sent
