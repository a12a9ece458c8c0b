"""Real vLLM on the pocket LM, for benchmarks, started by ``serve/llm.py`` as a user would."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from common import ROOT
from pipeline import ProgramFailed, Work, environment, run_program

from memshare.progress import log

_STOP_SECONDS = 120.0


def vllm_llm() -> dict[str, Any]:
    """Settings of an LLM section: the pocket LM in float32, on a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    server = {
        "python": str(ROOT / ".venv-vllm" / "bin" / "python"),
        "dtype": "float32",
        "env": {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1"},
    }
    return {"backend": "vllm", "model": "pocket", "url": url, "server": server}


@contextmanager
def serve(work: Work) -> Iterator[None]:
    """``make vllm``, then the servers that ``work``'s configuration wants, until the block ends.

    Raises `ProgramFailed` if one of them doesn't get ready.
    """
    run_program(["make", "-C", str(ROOT), "vllm"], work.folder / "logs" / "make-vllm.log")
    words = [sys.executable, str(ROOT / "serve" / "llm.py"), "--config", str(work.file)]
    logfile = work.folder / "logs" / "serve-llm.log"
    log("starting vLLM")
    with logfile.open("ab") as errors:
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, env=environment()
        )
        assert process.stdout is not None
        try:
            if process.stdout.readline().strip() != "ready":
                tail = logfile.read_text(encoding="utf-8", errors="replace")[-2000:]
                raise ProgramFailed(f"vLLM did not start; {logfile}:\n{tail}")
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(_STOP_SECONDS)
