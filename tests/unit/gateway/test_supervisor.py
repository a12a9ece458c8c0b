"""Child processes that live and die together: real ones, stopped in order, none left behind."""

from __future__ import annotations

import os
import runpy
import shutil
import sys
import time
from pathlib import Path

import pytest

from memshare.children import Child
from memshare.gateway.supervisor import Restarted, Supervisor

POLITE = (
    "import signal, sys, time\n"
    "def stop(*_):\n"
    "    print('stopping', time.monotonic_ns(), flush=True)\n"
    "    sys.exit(0)\n"
    "signal.signal(signal.SIGTERM, stop)\n"
    "print('up', flush=True)\n"
    "time.sleep(60)\n"
)
STUBBORN = POLITE.replace("SIGTERM, stop", "SIGTERM, signal.SIG_IGN")
PARENT = (
    "import subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    "print(f'up {child.pid}', flush=True)\n"  # in one write, also where nothing is buffered
    "time.sleep(60)\n"
)


def up(supervisor: Supervisor, name: str, code: str) -> Child:
    part = supervisor.start(name, [sys.executable, "-c", code])
    deadline = time.monotonic() + 30
    while "up" not in part.tail():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return part


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_the_last_started_stops_first(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path, 20)
    first, second = up(supervisor, "first", POLITE), up(supervisor, "second", POLITE)
    assert supervisor.dead() is None
    assert supervisor.stop()
    moments = [int(part.tail().split()[-1]) for part in (second, first)]
    assert moments == sorted(moments)
    assert [part.process.returncode for part in (first, second)] == [0, 0]


def test_what_does_not_stop_is_killed(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path, 0.2)
    part = up(supervisor, "stubborn", STUBBORN)
    assert not supervisor.stop()
    assert part.process.returncode == -9


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_children_of_children_are_not_left_behind(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path, 20)
    part = up(supervisor, "parent", PARENT)
    grandchild = int(part.tail().split()[-1])
    assert alive(grandchild)
    supervisor.stop()
    deadline = time.monotonic() + 10
    while alive(grandchild):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_death_is_noticed_and_its_last_words_kept(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path / "logs", 20)
    up(supervisor, "well", POLITE)
    ill = supervisor.start("ill", [sys.executable, "-c", "raise SystemExit('out of luck')"])
    ill.process.wait(30)
    assert supervisor.dead() is ill
    assert ill.tail() == "out of luck" and ill.process.returncode == 1
    again = supervisor.start("ill", [sys.executable, "-c", "raise SystemExit('again')"])
    again.process.wait(30)
    assert again.tail() == "again"  # and nothing of who had the log before
    silent = supervisor.start("ill", [sys.executable, "-c", "raise SystemExit(1)"])
    silent.process.wait(30)
    assert silent.tail() == "(it wrote nothing, or found no room for it)"
    shutil.rmtree(again.log_file.parent)
    assert "no log" in again.tail()
    up(supervisor, "new", POLITE)
    assert supervisor.stop()


def test_up_waits_for_a_gateway_that_takes_its_whole_time_twice(tmp_path: Path) -> None:
    main = runpy.run_path(str(Path(__file__).parents[3] / "serve" / "up.py"))["main"]
    graces = []

    class Noted(Exception):
        pass

    def note(folder: Path, grace_seconds: float) -> None:
        graces.append(grace_seconds)
        raise Noted

    main.__globals__["Supervisor"] = note
    config = tmp_path / "config.yaml"
    config.write_text("gateway: {shutdown_seconds: 40}\n")
    with pytest.raises(Noted):
        main(["--config", str(config)])
    assert graces == [95]


def test_what_fails_again_and_again_is_started_less_and_less_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("memshare.gateway.supervisor.time.monotonic", lambda: now)
    supervisor = Supervisor(tmp_path, 20)
    part = Restarted(supervisor, "ill", [sys.executable, "-c", "raise SystemExit(1)"], None, 60.0)

    def fails_after(seconds: float) -> float:
        nonlocal now
        part.start_if_due()
        assert part.part is not None and supervisor.parts == [part.part]
        part.part.process.wait(30)
        now += seconds
        pause = part.put_off()
        assert part.part is None and supervisor.parts == []
        now += pause - 1
        part.start_if_due()
        assert part.part is None  # not before its time
        now += 1
        return pause

    assert [fails_after(5) for _ in range(8)] == [60, 120, 240, 480, 960, 1920, 3600, 3600]
    assert fails_after(3601) == 60  # it had done something
    assert fails_after(5) == 120
    part.start_if_due()
    started = part.part
    part.start_if_due()
    assert part.part is started  # it runs
