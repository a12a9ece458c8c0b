"""A real SLURM of two nodes on this machine: munged, slurmctld and two slurmd, for tests."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
_UP_SECONDS = 60.0

_CONF = """
ClusterName=memshare-test
SlurmctldHost=localhost
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
# How long a requeued job waits before it starts again: two minutes by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=30
SlurmdTimeout=300
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=2
PartitionName=all Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP GraceTime=90
PartitionName=urgent Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""


def missing() -> list[str]:
    """The programs that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


@dataclass(frozen=True)
class Cluster:
    """A running cluster. ``env`` lets SLURM's commands find it."""

    folder: Path
    env: dict[str, str]

    def call(self, *command: str, cwd: Path | None = None, script: str | None = None) -> str:
        """One of SLURM's commands, or memshare's; what it printed."""
        done = subprocess.run(
            command, env=self.env, cwd=cwd, input=script, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What ``scontrol show job`` says of it."""
        told = self.call("scontrol", "show", "job", "--oneliner", number)
        return dict(word.split("=", 1) for word in told.split() if "=" in word)

    def wait(self, number: str, seconds: float = 120.0) -> str:
        """Wait for the end of a job; returns its state. Fails the test if it does not end."""
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        until(lambda: self.job(number)["JobState"] in ended, seconds, lambda: str(self.job(number)))
        return self.job(number)["JobState"]


def until(what: Callable[[], bool], seconds: float, told: Callable[[], str]) -> None:
    """Wait until ``what()``; fails with ``told()`` after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, told()
        time.sleep(0.1)


def _free_ports() -> tuple[int, int]:
    """A free port for the controller, and the first of two free neighbours for the nodes."""
    for first in range(20000 + os.getpid() % 10000, 32000):
        with suppress(OSError), socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", first))
            two.bind(("127.0.0.1", first + 1))
            with socket.socket() as other:
                other.bind(("127.0.0.1", 0))
                return other.getsockname()[1], first
    raise AssertionError("no free ports")


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Start it in ``folder``, wait until both nodes are idle, and stop it by the processes' ids.

    Must run as root; the path of ``folder`` has to fit a socket's name.
    """
    folder.chmod(0o755)
    controller, first = _free_ports()
    conf = folder / "slurm.conf"
    conf.write_text(_CONF.format(folder=folder, controller=controller, first=first, last=first + 1))
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    env = {**os.environ, "SLURM_CONF": str(conf)}
    munge = [
        "munged", "--foreground", "--force", f"--socket={folder}/munge.socket",
        f"--key-file={key}", f"--pid-file={folder}/munge.pid", f"--seed-file={folder}/munge.seed",
        f"--log-file={folder}/munge.log",
    ]  # fmt: skip
    daemons: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> None:
        with open(folder / "daemons.log", "ab") as log:
            daemons.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))

    made = Cluster(folder, env)
    try:
        start(*munge)
        until((folder / "munge.socket").exists, 10, lambda: _logs(folder))
        start("slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            start("slurmd", "-D", "-N", node)
        until(lambda: _idle(env) == 2, _UP_SECONDS, lambda: _logs(folder))
        yield made
    finally:
        try:
            subprocess.run(["scancel", "--user=root"], env=env, timeout=20)
            until(lambda: _idle(env) == 2, 30, lambda: _logs(folder))
        finally:  # also where it never came up
            for daemon in reversed(daemons):
                daemon.terminate()
                try:
                    daemon.wait(15)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()


def _idle(env: dict[str, str]) -> int:
    words = ["sinfo", "--noheader", "--Node", "--partition=all", "--format=%T"]
    told = subprocess.run(words, env=env, capture_output=True, text=True)
    return told.stdout.split().count("idle")


def _logs(folder: Path) -> str:
    return "\n".join(f"{p}:\n{p.read_text()[-2000:]}" for p in sorted(folder.glob("*.log")))
