"""serve/llm.py: servers that share a GPU start one after the other, others at once.

The servers are processes that speak vLLM's protocol (tests/fake_vllm.py) once they are let; the
GPUs are names. What is tested is when they are started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.fake_vllm import fake_python
from tests.postgres import free_port
from tests.tiny_lm import tiny_lm

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("gpus", "at_once"), [("0", 1), ("0,1", 2)])
def test_servers_that_share_a_gpu_start_one_after_the_other(
    tmp_path: Path, gpus: str, at_once: int
) -> None:
    model, loaded = tiny_lm(tmp_path / "lm", context=2048), tmp_path / "loaded"
    server = {"python": str(fake_python(tmp_path / "python", model, loaded))}
    tree = {
        role: {"backend": "vllm", "model": str(model), "server": server,
               "url": f"http://127.0.0.1:{free_port()}"}
        for role in ("agent_llm", "scorer_llm")
    }  # fmt: skip
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"run": {"dir": str(tmp_path / "run")}, **tree}))
    program = subprocess.Popen(
        [sys.executable, str(ROOT / "serve" / "llm.py"), "--config", str(config)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": gpus, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip

    def started() -> int:
        logs = (tmp_path / "run" / "logs").glob("vllm-*.log")
        return sum("GPUs" in log.read_text() for log in logs)

    try:
        while started() < at_once:
            assert program.poll() is None
            time.sleep(0.05)
        time.sleep(1.0)  # time for one more
        assert started() == at_once
        loaded.touch()
        assert program.stdout is not None and program.stdout.readline() == "ready\n"
        assert started() == 2
    finally:
        program.send_signal(signal.SIGTERM)
        assert program.wait(60) == 0
