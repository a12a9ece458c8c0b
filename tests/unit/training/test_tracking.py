from __future__ import annotations

import errno
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from memshare.config import WandbConfig
from memshare.files import RunLocked
from memshare.training import outcome, tracking
from memshare.training.tracking import Tracker, new_run_id, wandb_mode
from tests.disks import fill_up, small_disk


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def test_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    auto = WandbConfig()
    assert wandb_mode(auto) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert wandb_mode(auto) == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode(auto) == "disabled"
    assert wandb_mode(WandbConfig(mode="offline")) == "offline"
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "0" * 40)
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode(auto) == "online"


def test_an_offline_run_is_written(tmp_path: Path) -> None:
    run_id = new_run_id()
    config = WandbConfig(mode="offline")
    with Tracker(tmp_path, config, run_id=run_id, settings={"lr": 1.0}) as tracker:
        for step in range(1, 4):
            tracker.log(step, {"loss": 1.0 / step})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert tracker.wandb["mode"] == "offline" and tracker.wandb["id"] == run_id
    [written] = Path(str(tracker.wandb["dir"])).glob(f"run-{run_id}.wandb")
    # W&B's own process closes the file; at the end of a program it is waited for.
    until = time.monotonic() + 30.0
    while b"loss" not in written.read_bytes() and time.monotonic() < until:
        time.sleep(0.05)
    assert b"loss" in written.read_bytes()


def test_resumed_log_has_each_step_once(tmp_path: Path) -> None:
    config = WandbConfig(mode="disabled")
    with Tracker(tmp_path, config, run_id="a", settings={}) as tracker:
        for step in range(1, 8):
            tracker.log(step, {"loss": 1.0})
    with open(tmp_path / "log.jsonl", "a") as handle:
        handle.write('{"step": 8, "lo')  # cut off by a crash
    with Tracker(tmp_path, config, run_id="a", settings={}, done=5) as tracker:
        tracker.log(6, {"loss": 2.0})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert lines(tmp_path)[-1]["loss"] == 2.0
    assert tracker.wandb["dir"] is None
    assert not (tmp_path / "wandb").exists()


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    config = WandbConfig(mode="offline")
    with Tracker(tmp_path, config, run_id="a", settings={}, main=False) as tracker:
        tracker.show(1, 2, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


class _Broken(BaseHTTPRequestHandler):
    """A W&B server that answers everything with 503."""

    def do_POST(self) -> None:
        self.send_response(503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def _server(kind: str) -> Iterator[str]:
    if kind == "mute":  # accepts connections and says nothing, ever
        with socket.create_server(("127.0.0.1", 0)) as mute:
            yield f"http://127.0.0.1:{mute.getsockname()[1]}"
        return
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Broken)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("kind", ["mute", "broken"])
def test_a_failing_wandb_neither_slows_nor_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(tracking, "_INIT_SECONDS", 3.0)
    monkeypatch.setattr(tracking, "_FINISH_SECONDS", 60.0)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with _server(kind) as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        with Tracker(tmp_path, WandbConfig(mode="online"), run_id="a1", settings={}) as tracker:
            began = time.monotonic()
            for step in range(1, 101):
                tracker.log(step, {"loss": 1.0})
            assert time.monotonic() - began < 2.0
        assert len(lines(tmp_path)) == 100
        assert tracker.wandb["mode"] == "offline"  # kept, for `wandb sync` on a better day
        assert list(Path(str(tracker.wandb["dir"])).glob("run-a1.wandb"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_become_requests(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with outcome.stop_requests() as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked and stop.signal == number.name
    assert signal.getsignal(number) is before


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


def test_a_full_disk_is_told_wherever_it_shows(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    said = r"No space left.*run the same command again"
    with (
        pytest.raises(outcome.DiskFull, match=said),
        outcome.told(tmp_path, (ValueError,), writes=True),
    ):
        raise full
    assert (outcome.read_result(tmp_path) or {})["status"] == "failed"
    with small_disk(tmp_path / "disk", "64k") as disk:
        fill_up(disk)  # there is no room for the result either
        with pytest.raises(outcome.DiskFull), outcome.told(disk, (ValueError,), writes=True):
            raise full
        assert outcome.read_result(disk) is None
    with (
        pytest.raises(OSError, match="Permission denied"),
        outcome.told(tmp_path, (ValueError,), writes=True),
    ):
        raise OSError(errno.EACCES, "Permission denied")
