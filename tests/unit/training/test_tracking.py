from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Literal

import psutil
import pytest

from memshare.config import ConfigError, WandbConfig
from memshare.training import tracking, wandb_run
from memshare.training.tracking import Tracker, new_run_id
from memshare.training.wandb_run import wandb_mode
from tests.fake_wandb import fake_wandb


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "no-settings"))


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def test_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    auto = WandbConfig()
    assert wandb_mode(auto) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert wandb_mode(auto) == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode(auto) == "disabled"
    monkeypatch.setenv("WANDB_MODE", " Offline")
    assert wandb_mode(auto) == "offline"
    monkeypatch.setenv("WANDB_MODE", "")
    assert wandb_mode(auto) == "online"
    monkeypatch.setenv("WANDB_MODE", "foo")
    with pytest.raises(ConfigError, match=r"^WANDB_MODE is foo; W&B knows online, offline, "):
        wandb_mode(auto)
    assert wandb_mode(WandbConfig(mode="offline")) == "offline"
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "0" * 40)
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode(auto) == "online"


def test_a_service_of_ones_own_is_known_by_its_login(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`wandb login --host` writes its address into one file, and the key for it into another."""
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    host = "wandb.cluster:8080"
    (tmp_path / "netrc").write_text(f"machine {host} login user password {'0' * 40}")
    (tmp_path / "netrc").chmod(0o600)
    assert wandb_mode(WandbConfig()) == "offline"  # no key for W&B's own
    (tmp_path / "settings").write_text(f"[default]\nbase_url = http://{host}\n")
    assert wandb_mode(WandbConfig()) == "online"
    (tmp_path / "settings").write_text("no settings")
    assert wandb_mode(WandbConfig()) == "offline"
    monkeypatch.setenv("WANDB_BASE_URL", f"http://{host}")
    assert wandb_mode(WandbConfig()) == "online"


def test_a_key_file_that_can_not_be_read_means_no_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path))  # a folder
    assert wandb_mode(WandbConfig()) == "offline"
    (tmp_path / "netrc").write_bytes(b"machine api.wandb.ai login user password \xff\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode(WandbConfig()) == "offline"


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


def test_a_wandb_without_a_private_setting_is_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(wandb_run._FLUSH, "x_that_is_gone", 1.0)
    with Tracker(tmp_path, WandbConfig(mode="offline"), run_id="a1", settings={}) as tracker:
        assert tracker.wandb["mode"] == "offline"


@pytest.mark.parametrize(("asked", "mode"), [("", "auto"), ("OFFLINE", "auto"), ("x", "offline")])
def test_wandb_itself_is_spared_what_it_would_fail_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, mode: Literal["auto", "offline"]
) -> None:
    monkeypatch.setenv("WANDB_MODE", asked)
    with Tracker(tmp_path, WandbConfig(mode=mode), run_id="a1", settings={}) as tracker:
        tracker.log(1, {"loss": 0.5})
        tracker._worth_waiting.wait(60.0)
    assert tracker.wandb["mode"] == "offline"
    assert list(Path(str(tracker.wandb["dir"])).glob("run-a1.wandb"))


def test_a_slow_start_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine under load, a run of seconds: what W&B does on this machine is worth it."""
    monkeypatch.setattr(tracking, "_LAST_SECONDS", 0.01)
    with Tracker(tmp_path, WandbConfig(mode="offline"), run_id="a1", settings={}) as tracker:
        tracker.log(1, {"loss": 0.5})
        tracker._worth_waiting.wait(60.0)  # it has begun
    [written] = Path(str(tracker.wandb["dir"])).glob("run-a1.wandb")
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
    if kind in ("mute", "refused"):
        with socket.create_server(("127.0.0.1", 0)) as mute:
            url = f"http://127.0.0.1:{mute.getsockname()[1]}"
            if kind == "mute":  # accepts connections and says nothing, ever
                yield url
        if kind == "refused":
            yield url
        return
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Broken)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def online(monkeypatch: pytest.MonkeyPatch, url: str) -> WandbConfig:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", url)
    return WandbConfig(mode="online")


@pytest.mark.parametrize("kind", ["mute", "refused", "broken"])
def test_a_failing_wandb_neither_slows_nor_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    with _server(kind) as url:
        began = time.monotonic()
        with Tracker(tmp_path, online(monkeypatch, url), run_id="a1", settings={}) as tracker:
            for step in range(1, 101):
                tracker.log(step, {"loss": 1.0})
            assert time.monotonic() - began < 2.0
        assert time.monotonic() - began < 8.0
    assert len(lines(tmp_path)) == 100
    assert "W&B can't be reached (it does not answer)" in capsys.readouterr().err
    assert tracker.wandb["mode"] == "offline"  # kept, for `wandb sync` on a better day
    assert list(Path(str(tracker.wandb["dir"])).glob("run-a1.wandb"))


def test_an_online_run_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_wandb() as service:
        config = online(monkeypatch, service.url)
        with Tracker(tmp_path, config, run_id="a1", settings={"lr": 0.125}) as tracker:
            tracker.log(1, {"loss": 0.0625})
        assert service.opened and tracker.wandb["mode"] == "online"
        assert str(tracker.wandb["url"]).endswith("/me/memshare/runs/a1")
        sent = b"".join(service.received)
        assert b"0.125" in sent and b"0.0625" in sent


def test_steps_that_were_lost_and_told_once_more_are_charted_where_they_belong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after step 10, a training goes on from its checkpoint of step 5; both are offline."""
    for done, last in ((0, 10), (5, 12)):
        config = WandbConfig(mode="offline")
        with Tracker(tmp_path, config, run_id="a1", settings={}, done=done) as tracker:
            for step in range(done + 1, last + 1):
                tracker.log(step, {"loss": 1.0 / step})
            tracker._worth_waiting.wait(60.0)
        time.sleep(1.1)  # folders are named by the second
    with fake_wandb() as service:
        online(monkeypatch, service.url)
        for folder in sorted((tmp_path / "wandb").glob("offline-run-*")):
            command = [sys.executable, "-m", "wandb", "sync", str(folder)]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
    told = [(row["training_step"], row["loss"]) for row in service.history]
    assert told == [(step, 1.0 / step) for step in (*range(1, 11), *range(6, 13))]
    [*_, last] = (json.loads(body) for body in service.received if b'"UpsertBucket"' in body)
    metrics = json.loads(last["variables"]["config"])["_wandb"]["value"]["m"]
    names = [each["1"] for each in metrics]  # "5" is the place, from 1, of what a metric is over
    over = {each["1"]: names[each["5"] - 1] for each in metrics if "5" in each}
    assert over == {"loss": "training_step"}
    # Of a loop's rounds each has a run, which a name that is made up would not tell apart.
    sent = b"".join(service.received)
    assert f'"displayName":"{tmp_path}"'.encode() in sent
    assert f'"groupName":"{tmp_path.parent}"'.encode() in sent


@pytest.mark.parametrize(
    ("folder", "config", "environment", "group"),
    [
        ("runs/x/training/000003", {}, "", "runs/x/training"),
        ("runs/x/training/000003/iteration-2", {}, "", "runs/x/training"),
        ("out", {}, "", None),
        ("runs/x/training/000003", {}, "theirs", "theirs"),
        ("runs/x/training/000003", {"group": "mine"}, "theirs", "mine"),
    ],
)
def test_a_loops_rounds_are_a_group(
    monkeypatch: pytest.MonkeyPatch, folder: str, config: dict[str, str], environment: str,
    group: str | None,
) -> None:  # fmt: skip
    asked: dict[str, object] = {}
    monkeypatch.setenv("WANDB_RUN_GROUP", environment)
    monkeypatch.setattr("wandb.init", lambda **how: asked.update(how))
    wandb_run.open_run(WandbConfig(**config), "offline", "a1", {}, Path(folder))
    assert asked["group"] == group


@pytest.mark.parametrize("fails", [False, True])
def test_wandb_is_told_whether_the_training_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    with (
        fake_wandb() as service,
        suppress(ValueError),
        Tracker(tmp_path, online(monkeypatch, service.url), run_id="a1", settings={}),
    ):
        if fails:
            raise ValueError("it diverged")
    (code,) = re.findall(rb'"exitcode": ?(\d+)', b"".join(service.received))
    assert code == (b"1" if fails else b"0")


@pytest.mark.parametrize("kind", ["silent", "gone"])
def test_a_wandb_that_stops_in_the_middle_is_not_waited_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    with fake_wandb() as service:
        config = online(monkeypatch, service.url)
        with Tracker(tmp_path, config, run_id="a1", settings={}) as tracker:
            tracker.log(1, {"loss": 1.0})
            until = time.monotonic() + 30.0
            while tracker.wandb["dir"] is None and time.monotonic() < until:
                time.sleep(0.05)
            service.silent.set()
            if kind == "gone":
                service.shutdown()
                service.server_close()
            tracker.log(2, {"the_last_one": 1.0})
            began = time.monotonic()
        assert time.monotonic() - began < 8.0
    [written] = Path(str(tracker.wandb["dir"])).glob("run-a1.wandb")
    assert b"the_last_one" in written.read_bytes()  # for `wandb sync`
    told = capsys.readouterr().err
    assert "W&B did not finish in time; `wandb sync " in told and "gave up" not in told
    # Nothing is left that the end of the program would wait for.
    assert "wandb-core" not in [child.name() for child in psutil.Process().children()]
