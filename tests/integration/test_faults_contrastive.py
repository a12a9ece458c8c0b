"""Faults of train/contrastive.py's surroundings: a full disk."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file

from memshare.retrieval.encoder import Encoder
from memshare.training import checkpoint
from memshare.training.outcome import read_result
from tests.disks import small_disk
from tests.tiny import tiny_encoder
from tests.training_data import examples, write_round
from tests.training_runs import load_program, options, result, steps_saved


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
        assert taken == 0 and reasons.total() > 6, "the disk was hardly ever full"
        assert len(reasons) > 2, "the same file failed each time"
        assert result(output)["status"] == "trained"
        weights = [load_file(f / "encoder" / "model.safetensors") for f in (output, whole)]
        assert all(weights[0][name].equal(weights[1][name]) for name in weights[1])
        Encoder.from_folder(output / "encoder", "cpu")
