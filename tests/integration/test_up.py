"""serve/up.py: everything at once, stopped cleanly, and down together when a server dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import httpx
import pytest

from memshare.training.journal import Journal, Round
from tests.loop import loop_config_file

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def launch(
    run_dir: Path, models: Path, *more: str, **continual: float | None
) -> subprocess.Popen[bytes]:
    sections = {"wandb": {"mode": "disabled"}, "continual": continual}
    config = loop_config_file(run_dir, models, **sections)
    command = [sys.executable, str(ROOT / "serve/up.py"), "--config", str(config), *more]
    with open(run_dir / "up.log", "wb") as log:
        default = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # also under nohup
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, preexec_fn=default)


def wait_for(words: str, run_dir: Path, process: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + 180
    while words not in (text := (run_dir / "up.log").read_text()):
        assert process.poll() is None, text
        assert time.monotonic() < deadline, text
        time.sleep(0.2)
    return text


def free_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


def pids(log: str) -> dict[str, int]:
    words = [line.split() for line in log.splitlines() if " started " in line]
    return {word[2]: int(word[4].rstrip(",")) for word in words}


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.slow
def test_everything_runs_and_stops_in_order(tmp_path: Path, models: Path) -> None:
    process = launch(tmp_path, models, "--port", free_port())
    try:
        log = wait_for("status: generation", tmp_path, process)
        assert set(pids(log)) == {"gateway", "continual"}
        url = json.loads((tmp_path / "gateway.json").read_text())["url"]
        assert httpx.get(f"{url}/readyz").json()["ready"]
        second = launch(tmp_path / "other", models, "--set", f"run.dir={tmp_path}")
        assert second.wait(120) == 2
        assert "another up is running" in (tmp_path / "other" / "up.log").read_text()
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(120)
    log = (tmp_path / "up.log").read_text()
    assert code == 0, log
    assert log.index("stopped continual") < log.index("stopped gateway")
    assert "Traceback" not in log
    assert all(gone(pid) for pid in pids(log).values())


@pytest.mark.slow
def test_a_part_that_dies_takes_the_rest_down(tmp_path: Path, models: Path) -> None:
    host, shown = ("::1", "http://[::1]:") if has_ipv6() else ("127.0.0.1", "http://127.0.0.1:")
    process = launch(tmp_path, models, "--no-train", "--host", host, "--port", "0")
    try:
        log = wait_for(f"serving on {shown}", tmp_path, process)
        os.kill(pids(log)["gateway"], signal.SIGKILL)
        assert process.wait(120) == 1
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(120)
    log = (tmp_path / "up.log").read_text()
    assert "gateway ended with exit code -9" in log
    assert f"listening on {shown}" in log.split("exit code -9")[1]  # its own last words


@pytest.mark.slow
def test_a_trainer_that_fails_is_started_again_while_serving_goes_on(
    tmp_path: Path, models: Path
) -> None:
    journal = tmp_path / "continual.json"
    journal.write_text("no journal")
    process = launch(tmp_path, models, "--port", free_port(), rounds=1, retry_seconds=0.5)
    try:
        log = wait_for("the trainer starts again in 1 s", tmp_path, process)
        first, second = log.split("serving goes on; the trainer starts again in 0.5 s")
        for words in (first, second):
            assert "continual ended with exit code 1" in words
            assert words.split("ended with exit code")[1].count(f"error: {journal}") == 1
        config = tmp_path / "config.yaml"  # which somebody edits meanwhile, with a slip
        right = config.read_text()
        config.write_text(right + "trainin: {}\n")
        log = wait_for("continual ended with exit code 2", tmp_path, process)
        url = json.loads((tmp_path / "gateway.json").read_text())["url"]
        assert httpx.get(f"{url}/readyz").json()["ready"]
        config.write_text(right)
        Journal().begin(Round(1, {}, "start")).advance({}, outcome="empty").save(journal)
        log = wait_for("continual has nothing more to do; serving goes on", tmp_path, process)
        assert log.count("started gateway") == 1 < log.count("started continual")
    finally:
        process.send_signal(signal.SIGHUP)  # as of a terminal that is closed
        code = process.wait(120)
    log = (tmp_path / "up.log").read_text()
    assert code == 0, log
    assert all(gone(pid) for pid in pids(log).values())


@pytest.mark.slow
def test_a_trainer_that_fails_ends_everything_where_that_is_asked_for(
    tmp_path: Path, models: Path
) -> None:
    (tmp_path / "continual.json").write_text("no journal")
    process = launch(tmp_path, models, "--port", free_port(), retry_seconds=None)
    try:
        assert process.wait(180) == 1
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(120)
    log = (tmp_path / "up.log").read_text()
    assert "continual ended with exit code 1" in log and "stopped gateway" in log
