"""serve/up.py while it waits: for how long, for whom, and at which address."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from memshare.gateway.readiness import url_of, written_ns

UP = Path(__file__).parents[3] / "serve" / "up.py"
UNREACHABLE = {"ready": True, "llm": {"agent": "unreachable: it", "scorer": "in process"}}
STARTING = {"ready": False, "reason": "starting", "llm": {"agent": "unknown"}}
READY = {"ready": True, "llm": {"agent": "reachable", "scorer": "in process"}}


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("http://127.0.0.1:4567", "http://127.0.0.1:4567"),
        ("http://0.0.0.0:4567", "http://127.0.0.1:4567"),
        ("http://[::1]:4567", "http://[::1]:4567"),
        ("http://[::]:4567", "http://[::1]:4567"),
        ("http://node-7:4567", "http://node-7:4567"),
    ],
)
def test_the_gateway_tells_its_address(tmp_path: Path, url: str, asked: str) -> None:
    record = tmp_path / "gateway.json"
    assert url_of(record, written_ns(record)) is None
    record.write_text(json.dumps({"url": url}))
    assert url_of(record, 0) == asked
    assert url_of(record, written_ns(record)) is None  # of one that has gone


class Waiting:
    """`wait` of serve/up.py on a clock of its own; ``says(seconds)`` is what /readyz does."""

    def __init__(self, says: Callable[[float], Any]) -> None:
        self.now, self.lines, self.stop = 0.0, [], float("inf")
        up = runpy.run_path(str(UP))
        self.failed, self._wait = up["Failed"], up["wait"]
        known: dict[str, Any] = up["wait"].__globals__
        known["time"] = SimpleNamespace(monotonic=lambda: self.now)
        known["url_of"] = lambda *_: None if says(self.now) is None else "http://here"
        known["state_of"] = lambda _: says(self.now)
        known["log"] = self.lines.append

    def is_set(self) -> bool:
        return self.now >= self.stop

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def __call__(self, limit: float) -> Any:
        supervisor = SimpleNamespace(dead=lambda: None)
        return self._wait(supervisor, Path("gateway.json"), 0, limit, self)


def test_a_gateway_that_loads_or_starts_has_all_the_time_it_needs() -> None:
    def says(now: float) -> Any:
        if now < 10_000:
            return None  # it loads an LLM: it has not told its address yet
        return STARTING if now < 20_000 else UNREACHABLE if now < 20_100 else READY

    waiting = Waiting(says)
    assert waiting(120.0) == "http://here"
    assert waiting.now == 20_100
    assert 300 < len(waiting.lines) < 340  # a line a minute
    assert "loads" in waiting.lines[0] and "not ready: starting" in waiting.lines[200]
    assert "agent unreachable: it" in waiting.lines[-1]


@pytest.mark.parametrize(
    ("state", "told"), [({}, "does not answer"), (UNREACHABLE, "LLMs: agent unreachable: it")]
)
def test_what_can_not_be_reached_is_given_up(state: dict[str, Any], told: str) -> None:
    waiting = Waiting(lambda now: STARTING if now < 1000 else state)
    with pytest.raises(waiting.failed, match=f"120 s.*{told}"):
        waiting(120.0)
    assert 1119 < waiting.now < 1123


def test_an_answer_that_was_late_is_no_silence() -> None:
    """Encoding takes the processor: now and then /readyz takes longer than it is waited for."""

    def says(now: float) -> Any:
        return READY if now > 900 else {} if now % 100 else STARTING

    waiting = Waiting(says)
    assert waiting(120.0) == "http://here"


def test_asked_to_stop_it_waits_no_longer() -> None:
    waiting = Waiting(lambda now: STARTING)
    waiting.stop = 5.0
    assert waiting(120.0) is None


@pytest.mark.parametrize(
    ("code", "failed_before", "ends"), [(2, False, True), (2, True, False), (1, False, False)]
)
def test_only_a_configuration_that_is_wrong_from_the_start_stops_serving(
    code: int, failed_before: bool, ends: bool
) -> None:
    up = runpy.run_path(str(UP))
    part = SimpleNamespace(
        name="continual",
        log_file="its.log",
        tail=lambda: "",
        process=SimpleNamespace(returncode=code),
    )
    trainer = SimpleNamespace(part=part, failed_before=failed_before, put_off=lambda: 60.0)
    with pytest.raises(up["Failed"]) if ends else nullcontext():
        up["check"](SimpleNamespace(dead=lambda: part), trainer)


def test_a_trainer_that_gets_too_few_gpus_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    config = tmp_path / "config.yaml"
    llm = "{backend: vllm, model: m, url: 'http://127.0.0.1:1', server: {tensor_parallel_size: 2}}"
    config.write_text(
        f"run: {{dir: {tmp_path}}}\nagent_llm: {llm}\nscorer_llm: {llm}\n"
        "continual: {num_processes: 2}\n"
    )
    up = runpy.run_path(str(UP))

    class Started(Exception):
        pass

    def start(*_: object) -> None:
        raise Started

    supervisor = SimpleNamespace(start=start, stop=lambda: True)
    known = up["main"].__globals__
    known |= {"Supervisor": lambda *_: supervisor, "on_stop": lambda _: None}
    assert up["main"](["--config", str(config)]) == 1
    assert "continual.num_processes: 2 processes, and 1 GPU(s)" in capsys.readouterr().err
    for fits in (["--no-train"], ["--set", "continual.num_processes=1"]):
        with pytest.raises(Started):
            up["main"](["--config", str(config), *fits])
