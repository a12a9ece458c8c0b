"""A child's log: its command line without secrets, its output, and the end of it in the error."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from memshare.config import ContinualConfig
from memshare.training import child
from memshare.training.child import ChildFailed, accelerate_command, run_child

SETTING = "--set=database_url=postgresql://ann:hunter2@db/memshare"


def test_what_a_child_was_started_with_is_told_without_secrets(tmp_path: Path) -> None:
    log, record = tmp_path / "logs" / "mine.log", tmp_path / "child.json"
    program = "import sys; print('got', len(sys.argv[1])); sys.exit(3)"
    command = [sys.executable, "-c", program, SETTING]
    with pytest.raises(ChildFailed) as failed:
        run_child(command, log, record, threading.Event(), tmp_path)
    written = log.read_text()
    assert f"got {len(SETTING)}" in written, "the child itself gets it whole"
    for told in (written, str(failed.value)):
        assert "postgresql://ann:***@db/memshare" in told and "hunter2" not in told
    assert "ended with code 3" in str(failed.value) and not record.exists()


def test_a_program_never_runs_unrecorded(tmp_path: Path) -> None:
    """Or a loop killed between starting and recording it would leave an orphan nobody stops."""
    record, seen = tmp_path / "child.json", tmp_path / "seen.json"
    program = (
        "import os, shutil, sys; shutil.copy(*sys.argv[1:]); assert os.getsid(0) == os.getpid()"
    )
    command = [sys.executable, "-c", program, str(record), str(seen)]
    # The parent records it as well, but too late: as one that is killed.
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(child, "_write_record", only_in_the_child(child._write_record))
        run_child(command, tmp_path / "log", record, threading.Event(), tmp_path)
    assert json.loads(seen.read_text())["session"] not in (0, os.getpid())


def only_in_the_child(write: Callable[[Path, int], None]) -> Callable[[Path, int], None]:
    parent = os.getpid()
    return lambda record, session: None if os.getpid() == parent else write(record, session)


def test_one_process_is_told_to_use_the_cpu_where_torch_finds_no_gpu() -> None:
    command = accelerate_command(ContinualConfig())
    assert ("--cpu" in command) == (not torch.cuda.is_available())
