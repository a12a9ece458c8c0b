"""Gateways as users run them: processes on ports."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import httpx

from tests.loop import loop_config_file

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 120


def launch(
    program: str, config: Path, *more: str, log: IO[str] | int = subprocess.PIPE
) -> subprocess.Popen[str]:
    """Start a program; ``log`` takes what it writes to standard error."""
    command = [sys.executable, str(ROOT / program), "--config", str(config), *more]
    return subprocess.Popen(command, cwd=ROOT, stderr=log, stdout=subprocess.DEVNULL, text=True)


def wait_ready(process: subprocess.Popen[str], run_dir: Path) -> str:
    """The gateway's URL once it is ready."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            log = process.communicate()[1] if process.stderr else "its log is below"
            raise AssertionError(f"exit {process.returncode}: {log}")
        try:
            url = str(json.loads((run_dir / "gateway.json").read_text())["url"])
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                return url
        except (FileNotFoundError, httpx.TransportError):
            pass
        time.sleep(0.1)
    raise AssertionError("not ready in time")


def stop(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code after SIGTERM, and the log of one started with a pipe."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=60)
    return process.returncode, log


@contextmanager
def gateway(run_dir: Path, models: Path, *more: str, **sections: Any) -> Iterator[str]:
    """A ready gateway's URL; at the end it must stop on SIGTERM, without a traceback in its log."""
    config = loop_config_file(run_dir, models, **sections)
    (run_dir / "gateway.json").unlink(missing_ok=True)
    log = run_dir / "gateway.log"  # a file: a pipe that nobody reads would fill and block it
    with log.open("w") as handle:
        process = launch("serve/gateway.py", config, "--port", "0", *more, log=handle)
    try:
        yield wait_ready(process, run_dir)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(60)
        finally:
            process.kill()
        text = log.read_text()
        print(text)  # pytest shows it if the test fails
    assert code == 0, text
    assert "Traceback" not in text, text
