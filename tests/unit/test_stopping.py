"""Being told to stop, in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, sys
from memshare.stopping import on_stop
if sys.argv[1:] == ["nohup"]:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
told = []
on_stop(told.append)
for name in ("SIGHUP", "SIGTERM", "SIGINT", "SIGHUP"):
    os.kill(os.getpid(), signal.Signals[name])
print(told)
"""


@pytest.mark.parametrize("how, told", [((), "['SIGHUP']"), (("nohup",), "['SIGTERM']")])
def test_the_first_signal_is_told_and_all_later_ones_are_ignored(
    how: tuple[str, ...], told: str
) -> None:
    # Whatever runs the tests may have SIGHUP ignored: it starts from the default here.
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *how], capture_output=True, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )  # fmt: skip
    assert done.stdout.strip() == told, done.stderr


def test_a_log_that_nobody_reads_ends_nothing() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    lines = "from memshare.progress import log; log('no one'); print('went on')"
    done = subprocess.run(
        [sys.executable, "-c", lines], stdout=subprocess.PIPE, stderr=writing, text=True
    )
    os.close(writing)
    assert (done.returncode, done.stdout) == (0, "went on\n")
