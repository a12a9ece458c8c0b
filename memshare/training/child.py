"""Running one program of the loop as a child: how, its end, and clearing up after a crash.

Everything that it starts (``accelerate launch`` starts the trainer) is asked to stop with it. Who
it is stands in a file while it runs: a loop that was killed leaves its child behind, and the next
loop stops that one before it starts anything.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

from memshare.children import Child, members, stop_session
from memshare.config import ConfigError, ContinualConfig, shown_command
from memshare.llm.plan import visible_gpus

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 30.0  # to save a checkpoint after SIGTERM
# With --cpu, accelerate would start one process, whatever their number; the programs find out
# themselves that there is no GPU. Port 0: a free one, since others may train on this machine.
_SEVERAL = ("--multi_gpu", "--main_process_port", "0")


class ChildFailed(RuntimeError):
    """A child ended with an error; the message holds the end of its log.

    ``code`` is its exit code, None where it left nothing behind though it said that it was done.
    """

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code


class Stopped(RuntimeError):
    """A signal asked the loop to stop while a child ran; the child was stopped first."""


def check_launch(config: ContinualConfig) -> None:
    """Raise `ConfigError` for what a round's training would find hours later.

    That is a configuration that accelerate does not find, GPUs that torch can't use, or fewer than
    processes. Here and not with the other settings, which programs read that train nothing, and
    elsewhere.
    """
    _read(config.accelerate_config)
    if gpu_precision() is not None and (gpus := len(visible_gpus())):  # else nobody has counted
        check_gpus(config, gpus)


def check_gpus(config: ContinualConfig, gpus: int) -> None:
    """Raise `ConfigError` where a round's training has more processes than ``gpus`` are for it."""
    told = _read(config.accelerate_config)
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true"}
    if _processes(config) > gpus and not (told.get("use_cpu") or on_cpu):
        by = "num_processes" if config.num_processes else "accelerate_config"
        raise ConfigError(
            f"continual.{by}: {_processes(config)} processes, and {gpus} GPU(s) for them; set "
            f"continual.num_processes to {gpus}, or leave the trainer more"
        )


def _processes(config: ContinualConfig) -> int:
    """How many of them train and encode on this machine."""
    told = _read(config.accelerate_config)
    here = int(told.get("num_processes") or 1) // int(told.get("num_machines") or 1)
    return config.num_processes or here


def accelerate_command(config: ContinualConfig, *, always: bool = True) -> list[str]:
    """The start of an ``accelerate launch`` command line, up to the program.

    Without ``always``, one process that needs none of accelerate's settings is Python's alone.
    """
    processes = config.num_processes or 1
    if not always and processes == 1 and config.accelerate_config is None:
        return [sys.executable]
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    if config.accelerate_config is not None:
        command += ["--config_file", str(config.accelerate_config)]
        command += _threads(_processes(config))
        if config.num_processes is None:
            return command
        command += ["--num_processes", str(processes)]
        single = processes > 1 and _starts_one(_read(config.accelerate_config))
        return [*command, *_SEVERAL] if single else command
    command += ["--num_processes", str(processes), "--num_machines", "1"]
    precision = gpu_precision()
    command += ["--mixed_precision", precision or "no", "--dynamo_backend", "no"]
    command += _threads(processes)
    if processes == 1:
        return command if precision else [*command, "--cpu"]
    return [*command, *_SEVERAL]


def _threads(processes: int) -> list[str]:
    """This machine's cores, divided, unless the environment says; accelerate gives each one."""
    if "OMP_NUM_THREADS" in os.environ:
        return []
    threads = max(1, len(os.sched_getaffinity(0)) // max(1, processes))
    return ["--num_cpu_threads_per_process", str(threads)]


def _read(path: Path | None) -> dict[str, Any]:
    """What is in a configuration of accelerate's, if there is one. Raises `ConfigError`."""
    try:
        settings = {} if path is None else yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"continual.accelerate_config: no file {path}, seen from {Path.cwd()}"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"continual.accelerate_config: {path}: {error}") from error
    return settings if isinstance(settings, dict) else {}


def _starts_one(settings: Mapping[str, Any]) -> bool:
    """Whether accelerate starts one process by these settings, whatever their number.

    Where it starts several already, `_SEVERAL` must not be given: that would undo FSDP.
    """
    kind = settings.get("distributed_type")
    return kind in (None, False, "NO", "MULTI_CPU")  # YAML's bare NO is False


def gpu_precision() -> str | None:
    """For accelerate's ``--mixed_precision``, by this machine's GPU; None where there is none.

    Raises `ConfigError` for one that torch can't use.

    Torch is asked in a process of its own, and only where there is a driver: it takes seconds to
    load, and might hold some of the GPU's memory for as long as the asker, this loop, lives.
    """
    try:
        if not Path("/dev/kfd").exists():  # AMD's
            ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    command = [sys.executable, "-m", "memshare.training.precision"]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    if told.returncode:
        raise ConfigError(told.stderr.strip().removeprefix("error: "))
    return told.stdout.strip() or None


def run_child(command: Sequence[str], log_file: Path, record: Path, stop: threading.Event) -> None:
    """Run ``command`` to its end, its output appended to ``log_file``; ``record`` names it.

    It is the child that writes the record, before it becomes the program (`recorded`). Raises
    `ChildFailed` for a non-zero exit code, `Stopped` once ``stop`` is set.
    """
    told = shown_command(command)
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("a", encoding="utf-8") as log:
        log.write(f"$ {told}\n")
    recorded = [sys.executable, "-m", "memshare.training.recorded", str(record)]
    child = Child([*recorded, *command], log_file)
    try:
        while child.process.poll() is None and not stop.wait(_POLL_SECONDS):
            pass
    finally:
        if child.process.poll() is None:
            child.stop(_GRACE_SECONDS, everyone=True)
    record.unlink(missing_ok=True)
    if stop.is_set():
        raise Stopped(f"{command[1]} was stopped")
    if code := child.process.returncode:
        end = textwrap.indent(child.tail(), "  ")
        raise ChildFailed(f"{told}\nended with code {code}; the end of {log_file}:\n{end}", code)


def stop_orphan(record: Path) -> bool:
    """Stop what a killed loop left running; True if there was anything."""
    try:
        row = json.loads(record.read_text(encoding="utf-8"))
        session, created = int(row["session"]), float(row["created"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False
    found = members(session)
    with suppress(psutil.NoSuchProcess):
        if abs(psutil.Process(session).create_time() - created) > 1.0:
            found = set()  # the number belongs to somebody else by now
    if found:
        stop_session(session, _GRACE_SECONDS, everyone=True)
    record.unlink(missing_ok=True)
    return bool(found)
