"""Real vLLM, started by ``serve/llm.py`` as a user would; and what trainer's tests start from."""

from __future__ import annotations

import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from memshare.config import LLMConfig
from memshare.llm.base import LLMError
from memshare.llm.factory import resolve_model
from tests.continual_runs import Run
from tests.postgres import free_port
from tests.tiny import tiny_encoder
from tests.tiny_lm import tiny_lm
from tests.training_data import examples, write_round
from tests.training_runs import load_program

ROOT = Path(__file__).parents[2]
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
START_SECONDS = 900.0


@dataclass(frozen=True)
class VLLMServer:
    """A running server; ``llm`` is the configuration of a client for it."""

    url: str
    model: str
    llm: LLMConfig


@pytest.fixture(scope="session")
def vllm_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The pocket LM where it is built, a random model of the same kind elsewhere."""
    try:
        return resolve_model("pocket")
    except LLMError:
        return str(tiny_lm(tmp_path_factory.mktemp("vllm") / "tiny", context=4096))


@pytest.fixture(scope="session")
def vllm_server(vllm_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServer]:
    """Real vLLM (CPU or CUDA) in float32; takes a minute or more to start."""
    if not VLLM_PYTHON.exists():
        pytest.skip(f"no vLLM environment at {VLLM_PYTHON.parent.parent}: run make vllm")
    url = f"http://127.0.0.1:{free_port()}"
    server = {
        "python": str(VLLM_PYTHON),
        "dtype": "float32",
        "env": {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
        "start_timeout_seconds": START_SECONDS,
        # Any parser will do that needs no tokens of its own.
        "args": ["--enable-auto-tool-choice", "--tool-call-parser", "pythonic"],
    }
    llm = LLMConfig(backend="vllm", model=vllm_model, url=url, server=server)
    with serve_llm(llm, tmp_path_factory.mktemp("serve-llm")):
        yield VLLMServer(url, vllm_model, llm)


@contextmanager
def serve_llm(llm: LLMConfig, folder: Path) -> Iterator[int]:
    """``serve/llm.py`` with ``llm`` as agent and scorer, once it is ready; its process id.

    It must end cleanly, and leave nothing behind.
    """
    config = folder / "config.yaml"
    section = llm.model_dump(mode="json")
    run = {"dir": str(folder / "run")}
    config.write_text(yaml.safe_dump({"run": run, "agent_llm": section, "scorer_llm": section}))
    command = [sys.executable, str(ROOT / "serve" / "llm.py"), "--config", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    lines: queue.Queue[str] = queue.Queue()
    reader = threading.Thread(
        target=lambda: [lines.put(line) for line in process.stdout], daemon=True
    )
    reader.start()
    try:
        _await_ready(process, lines)
        yield process.pid
    finally:
        children = _children(process.pid)
        process.send_signal(signal.SIGTERM)
        code = process.wait(90)
        assert code == 0, f"serve/llm.py ended with {code} after SIGTERM"
        # A killed process takes a moment to vanish; what still runs after that was left behind.
        deadline = time.monotonic() + 15
        while (left := [pid for pid in children if _runs(pid)]) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not left, f"vLLM was left behind: {left}"


def _await_ready(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
    deadline = time.monotonic() + START_SECONDS + 30
    while time.monotonic() < deadline:
        try:
            if lines.get(timeout=1.0).strip() == "ready":
                return
        except queue.Empty:
            pass
        if process.poll() is not None:
            pytest.fail(f"serve/llm.py ended with code {process.returncode}; see its output above")
    pytest.fail("serve/llm.py was not ready in time")


def _children(pid: int) -> list[int]:
    """Every living descendant of ``pid``."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *_children(int(child))]
    return found


def _runs(pid: int) -> bool:
    """Whether ``pid`` is alive; a zombie that waits for its parent is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny encoder and two rounds of examples."""
    folder = tmp_path_factory.mktemp("contrastive")
    tiny_encoder(folder / "encoder")
    write_round(folder / "round-1", examples(60))
    write_round(folder / "round-2", examples(40, start=60))
    return folder


@pytest.fixture(scope="module")
def program() -> ModuleType:
    """train/contrastive.py, in this process."""
    return load_program()


@pytest.fixture
def make_run(tmp_path: Path) -> Iterator[Any]:
    runs: list[Run] = []

    def make(**sections: Any) -> Run:
        runs.append(Run(tmp_path / f"run{len(runs)}", **sections))
        return runs[-1]

    yield make
    for run in runs:
        for child in run.children:
            if child.poll() is None:
                child.terminate()
                child.wait(60)
        run.store.close()
