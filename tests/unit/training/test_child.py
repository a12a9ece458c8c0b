"""A child: how accelerate is asked for processes, its log without secrets, and the end of it."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands import launch

from memshare.config import ContinualConfig
from memshare.training.child import ChildFailed, Stopped, accelerate_command, run_child

ACCELERATE = Path(__file__).parents[3] / "configs" / "accelerate"
SETTING = "--set=database_url=postgresql://ann:hunter2@db/memshare"


def test_what_a_child_was_started_with_is_told_without_secrets(tmp_path: Path) -> None:
    log, record = tmp_path / "logs" / "mine.log", tmp_path / "child.json"
    program = "import sys; print('got', len(sys.argv[1])); sys.exit(3)"
    command = [sys.executable, "-c", program, SETTING]
    with pytest.raises(ChildFailed) as failed:
        run_child(command, log, record, threading.Event())
    written = log.read_text()
    assert f"got {len(SETTING)}" in written, "the child itself gets it whole"
    for told in (written, str(failed.value)):
        assert "postgresql://ann:***@db/memshare" in told and "hunter2" not in told
    assert "ended with code 3" in str(failed.value) and not record.exists()
    command[2] = f"import os, sys; os.remove({str(log)!r}); sys.exit(3)"
    with pytest.raises(ChildFailed, match=r"ended with code 3(?s:.)*no log"):
        run_child(command, log, record, threading.Event())


def test_a_program_never_runs_unrecorded(tmp_path: Path) -> None:
    """Or a loop killed between starting and recording it would leave an orphan nobody stops."""
    record, seen = tmp_path / "child.json", tmp_path / "seen.json"
    program = (
        "import os, shutil, sys; shutil.copy(*sys.argv[1:]); assert os.getsid(0) == os.getpid();"
        "print('session', os.getpid())"
    )
    command = [sys.executable, "-c", program, str(record), str(seen)]
    run_child(command, tmp_path / "log", record, threading.Event())
    session = json.loads(seen.read_text())["session"]
    assert f"session {session}" in (tmp_path / "log").read_text()
    assert not record.exists()


def test_what_a_child_started_is_asked_to_stop_with_it(tmp_path: Path) -> None:
    """As the trainer, which saves a checkpoint then, and which accelerate started."""
    log, stop = tmp_path / "log", threading.Event()
    trainer = "(trap 'echo saved; exit' TERM; echo begun; while :; do sleep 0.05; done) & wait"

    def stop_it() -> None:
        while not log.exists() or "\nbegun" not in log.read_text():
            time.sleep(0.02)
        stop.set()

    threading.Thread(target=stop_it).start()
    with pytest.raises(Stopped):
        run_child(["/bin/sh", "-c", trainer], log, tmp_path / "child.json", stop)
    assert log.read_text().endswith("\nsaved\n")


def test_one_process_is_told_to_use_the_cpu_where_torch_finds_no_gpu() -> None:
    command = accelerate_command(ContinualConfig())
    assert ("--cpu" in command) == (not torch.cuda.is_available())


def started(command: list[str]) -> tuple[str, int]:
    """Which launcher accelerate takes for ``command``, and for how many processes."""
    assert command[1:3] == ["-m", "accelerate.commands.launch"]
    args = launch.launch_command_parser().parse_args([*command[3:], "program.py"])
    args, _, _ = launch._validate_launch_command(args)
    assert not args.cpu, "with it accelerate starts one process"
    if args.use_fsdp:
        return "fsdp", int(launch.prepare_multi_gpu_env(args) and args.nproc_per_node)
    if args.multi_gpu:
        return "several", int(launch.prepare_multi_gpu_env(args) and args.nproc_per_node)
    return "one", 1


@pytest.mark.parametrize("count", [None, 1, 2, 3])
@pytest.mark.parametrize("path", sorted(ACCELERATE.glob("*.yaml")), ids=lambda path: path.name)
def test_processes_are_as_many_as_asked_for_with_a_configuration_of_accelerates(
    path: Path, count: int | None
) -> None:
    own = yaml.safe_load(path.read_text())
    config = ContinualConfig(accelerate_config=path, num_processes=count)
    launcher, processes = started(accelerate_command(config))
    assert processes == (count or own["num_processes"])
    assert (launcher == "fsdp") == (own["distributed_type"] == "FSDP")


@pytest.mark.parametrize("kind", ["MULTI_CPU", "'NO'", "NO", "null"])
def test_several_processes_by_a_configuration_that_starts_one(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        f"compute_environment: LOCAL_MACHINE\ndistributed_type: {kind}\nnum_processes: 1\n"
    )
    config = ContinualConfig(accelerate_config=path, num_processes=2)
    assert accelerate_command(config)[-3:] == ["--multi_gpu", "--main_process_port", "0"]


def test_without_a_configuration_one_process_is_the_default() -> None:
    assert accelerate_command(ContinualConfig(), always=False) == [sys.executable]
    command = accelerate_command(ContinualConfig())
    assert command[command.index("--num_processes") + 1] == "1"
    assert started(accelerate_command(ContinualConfig(num_processes=2))) == ("several", 2)
