"""How a training ends: asked to stop, told in its result, refused, or for want of room."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from memshare.config import ConfigError
from memshare.files import DiskFull, RunLocked
from memshare.training import outcome
from memshare.training.checkpoint import CheckpointError, NotContinued
from tests.disks import fill_up, small_disk


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_become_requests(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with outcome.stop_requests() as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked and stop.signal == number.name
    assert signal.getsignal(number) is before


ASKED_TWICE = """
import os, signal
from memshare.training.outcome import stop_requests
with stop_requests() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    print(stop.signal, flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("still there", flush=True)
"""


def test_a_second_ctrl_c_ends_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", ASKED_TWICE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "SIGINT\n")
    assert done.stderr.strip().splitlines() == [
        "stopping after this step, to be continued; once more (Ctrl-C) ends at once"
    ]


def test_a_file_becomes_a_request_of_the_process_that_writes(tmp_path: Path) -> None:
    file, output = tmp_path / "stop", tmp_path / "out"
    with (
        outcome.attempt(output, (), True, file) as main,
        outcome.attempt(output, (), False, file) as other,  # takes no lock
    ):
        assert not main.asked
        file.touch()
        assert main.asked and not other.asked
        with pytest.raises(RunLocked), outcome.attempt(output, (), True, file):
            pass


def test_outcome_is_told_and_forgotten(tmp_path: Path) -> None:
    assert outcome.read_result(tmp_path) is None
    assert outcome.write_result(tmp_path, "empty", dropped={"no candidates": 3}) == 66
    assert outcome.read_result(tmp_path) == {"status": "empty", "dropped": {"no candidates": 3}}
    with outcome.told(tmp_path, (ValueError,), writes=True):
        assert outcome.read_result(tmp_path) is None
    with pytest.raises(ValueError), outcome.told(tmp_path, (ValueError,), writes=True):
        raise ValueError("it broke")
    assert outcome.read_result(tmp_path) == {"status": "failed", "error": "it broke"}
    with pytest.raises(KeyError), outcome.told(tmp_path, (ValueError,), writes=True):
        raise KeyError("a bug")
    assert outcome.read_result(tmp_path) is None


def test_a_run_that_is_refused_leaves_the_earlier_result(tmp_path: Path) -> None:
    refusal = NotContinued("made with other settings", "start afresh")
    for earlier in (None, {"status": "trained", "steps": 7}):
        if earlier:
            outcome.write_result(tmp_path, "trained", steps=7)
        with pytest.raises(NotContinued), outcome.told(tmp_path, (CheckpointError,), True):
            raise refusal
        left = outcome.read_result(tmp_path)
        assert left == (earlier or {"status": "failed", "error": str(refusal)})
    with pytest.raises(ConfigError), outcome.told(tmp_path, (CheckpointError,), True):
        raise ConfigError("matryoshka")
    assert outcome.read_result(tmp_path) == left


def test_a_full_disk_is_told_wherever_it_shows(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    said = r"No space left.*run the same command again"
    with (
        pytest.raises(DiskFull, match=said),
        outcome.told(tmp_path, (ValueError,), writes=True),
    ):
        raise full
    assert (outcome.read_result(tmp_path) or {})["status"] == "failed"
    with small_disk(tmp_path / "disk", "64k") as disk:
        fill_up(disk)  # there is no room for the result either
        with pytest.raises(DiskFull), outcome.told(disk, (ValueError,), writes=True):
            raise full
        assert outcome.read_result(disk) is None
    with (
        pytest.raises(OSError, match="Permission denied"),
        outcome.told(tmp_path, (ValueError,), writes=True),
    ):
        raise OSError(errno.EACCES, "Permission denied")
